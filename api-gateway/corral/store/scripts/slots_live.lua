-- Renew a gateway's lease, and bring what it is thought to hold to what it says.
--
-- ARGV  1 gateway  2 lease, us  3.. of each of its requests: id, and "node 1|0" where it runs (1: its prompt is still
--       read), "" where it waits
-- Returns the ids of which the store knows nothing, or something else. What gateways held whose lease has run out is
-- taken back, and what this one does not know of: it was given while nobody heard. Nothing is given to anybody before
-- all that runs is counted.
local known = {}
for at = 3, #ARGV, 2 do known[ARGV[at]] = true end
redis.call('ZADD', P .. 'live', now + tonumber(ARGV[2]), ARGV[1])
for _, id in ipairs(redis.call('HKEYS', P .. 'held:' .. ARGV[1])) do
  if not known[id] then take_back(ARGV[1], id) end
end
for _, gateway in ipairs(redis.call('ZRANGEBYSCORE', P .. 'live', '-inf', now)) do
  for _, id in ipairs(redis.call('HKEYS', P .. 'held:' .. gateway)) do take_back(gateway, id) end
  redis.call('ZREM', P .. 'live', gateway)
end
local missing = {}
for at = 3, #ARGV, 2 do
  local text, runs = redis.call('HGET', P .. 'held:' .. ARGV[1], ARGV[at]), ARGV[at + 1]
  if not text or (runs ~= '' and runs_of(text) ~= runs) then missing[#missing + 1] = ARGV[at] end
end
if #missing == 0 and redis.call('EXISTS', P .. 'slots-grant') == 1 then
  -- What was taken back, and the backstop: nobody waits for a slot that is free.
  for _, model in ipairs(redis.call('SMEMBERS', P .. 'queued')) do serve(model) end
end
return missing
