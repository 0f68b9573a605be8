-- Say where a model stands on a node; what becomes free by it is given to those who wait.
--
-- ARGV  1 node  2 model  3 state  4 generation  5 slots  6 step
-- Returns 1, or 0 for a word that is older than the last, or of a term that is over: one that comes late must not be the
-- first on a place that the leader has yet to speak of. A generation begins with its term (`corral.store.demand`).
local node, model = ARGV[1], ARGV[2]
local old = place_of(model, node)
local generation = tonumber(ARGV[4])
if old and generation < old.generation then return 0 end
if math.floor(generation / 2 ^ 24) < tonumber(redis.call('GET', P .. 'leader-term') or 0) then return 0 end
stand(node, model, ARGV[3], generation, tonumber(ARGV[5]), tonumber(ARGV[6]))
if redis.call('EXISTS', P .. 'slots-grant') == 1 then serve_node(node, model) end
return 1
