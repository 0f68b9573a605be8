-- Say that a gateway is there.
--
-- KEYS  1 epoch      2 sorted set, gateway -> when it last said so, s
-- ARGV  1 the epoch that it knows      2 gateway      3 for how long it counts as there, s
-- Returns the gateways that are; nil in a store that has lost what it knew: others have yet to come back to it.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZADD', KEYS[2], string.format('%.6f', now), ARGV[2])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.6f', now - tonumber(ARGV[3])))
return redis.call('ZRANGE', KEYS[2], 0, -1)
