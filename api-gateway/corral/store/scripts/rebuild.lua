-- End a rebuild: the store grants again when every gateway has told what it knew, or after a while.
--
-- KEYS  1 epoch      2 declared: sorted set, gateway -> when it began to tell, us      3 how many there are
-- ARGV  1 gateway      2 how many gateways it knows      3 how long those are waited for that do not tell, us
-- Returns 1 where there is an epoch now.
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
redis.call('ZADD', KEYS[2], 'NX', now, ARGV[1])
local first = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
local many = math.max(tonumber(ARGV[2]), tonumber(redis.call('GET', KEYS[3]) or 0))
redis.call('SET', KEYS[3], many, 'PX', 60000)
if redis.call('ZCARD', KEYS[2]) < many and now - tonumber(first[2]) < tonumber(ARGV[3]) then return 0 end
redis.call('SET', KEYS[1], string.format('%.0f', now))
redis.call('DEL', KEYS[2], KEYS[3])
return 1
