-- Renew a gateway's lease, and bring what it is thought to hold to what it says.
--
-- ARGV  1 gateway  2 lease, us  3.. ids of its requests, running or waiting
-- Returns the ids that the store knows nothing of. What gateways held whose lease has run out is taken back, and what
-- this one does not know of: it was given while nobody heard.
local known = {}
for at = 3, #ARGV do known[ARGV[at]] = true end
redis.call('ZADD', P .. 'live', now + tonumber(ARGV[2]), ARGV[1])
local freed = {}
local function drop(gateway, id)
  local node, model = take_back(gateway, id)
  if node then freed[#freed + 1] = { node, model } end
end
for _, id in ipairs(redis.call('HKEYS', P .. 'held:' .. ARGV[1])) do
  if not known[id] then drop(ARGV[1], id) end
end
for _, gateway in ipairs(redis.call('ZRANGEBYSCORE', P .. 'live', '-inf', now)) do
  for _, id in ipairs(redis.call('HKEYS', P .. 'held:' .. gateway)) do drop(gateway, id) end
  redis.call('ZREM', P .. 'live', gateway)
end
if redis.call('EXISTS', P .. 'slots-grant') == 1 then
  for _, place in ipairs(freed) do serve_node(place[1], place[2]) end
  -- The backstop: nobody waits for a slot that is free.
  for _, model in ipairs(redis.call('SMEMBERS', P .. 'queued')) do serve(model) end
end
local missing = {}
for at = 3, #ARGV do
  if redis.call('HEXISTS', P .. 'held:' .. ARGV[1], ARGV[at]) == 0 then missing[#missing + 1] = ARGV[at] end
end
return missing
