-- Say where a model stands on a node; what becomes free by it is given to those who wait.
--
-- ARGV  1 node  2 model  3 state  4 generation  5 slots  6 step
-- Returns 1, or 0 for a word that is older than the last.
local node, model = ARGV[1], ARGV[2]
local old = place_of(model, node)
local generation, slots = tonumber(ARGV[4]), tonumber(ARGV[5])
if old and generation < old.generation then return 0 end
local before = old and old.state == 'resident' and old.slots or 0
local after = ARGV[3] == 'resident' and slots or 0
redis.call('HSET', P .. 'places:' .. model, node, table.concat({ ARGV[3], ARGV[4], ARGV[5], ARGV[6] }, ' '))
redis.call('INCRBY', P .. 'total:' .. model, after - before)
redis.call('SADD', P .. 'models:' .. node, model)
local used = tonumber(redis.call('HGET', P .. 'used:' .. model, node) or 0)
arrange(model, node, place_of(model, node), used)
local most = 0
for _, other in ipairs(redis.call('SMEMBERS', P .. 'models:' .. node)) do
  local place = place_of(other, node)
  if place and place.state == 'resident' then most = math.max(most, place.slots) end
end
redis.call('HSET', P .. 'busy:' .. node, 'slots', most)
if redis.call('EXISTS', P .. 'slots-grant') == 1 then serve_node(node, model) end
return 1
