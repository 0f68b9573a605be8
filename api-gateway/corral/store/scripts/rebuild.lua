-- End a step of a rebuild when every gateway has, or after a while: first all tell what the store last said (then there
-- is an epoch), next what happened without it (then it grants). Sums come after maxima, whoever is first.
--
-- KEYS  1 the key that says so      2 sorted set, gateway -> when it had told, us      3 how many there are
-- ARGV  1 gateway      2 how many gateways it knows      3 how long those are waited for that do not tell, us
-- Returns 1 where the step is over.
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
