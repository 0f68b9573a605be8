-- End a step of a rebuild when every gateway has, or after a while: first all tell what the store last said (then there
-- is an epoch), next what happened without it (then it grants). Sums come after maxima, whoever is first.
--
-- KEYS  1 the key that says so      2 sorted set, gateway -> when it had told, us      3 how many there are
--       4 what names the store that was told
-- ARGV  1 gateway      2 how many gateways it knows      3 how long those are waited for that do not tell, us
--       4 the name of the store that it has told      5 "1": the key gets that name, and 4 is no more
-- Returns 1 where the step is over, -1 where the store was flushed meanwhile, and is to be told anew.
if redis.call('GET', KEYS[4]) ~= ARGV[4] then return -1 end
if redis.call('EXISTS', KEYS[1]) == 1 then return 1 end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
redis.call('ZADD', KEYS[2], 'NX', now, ARGV[1])
local first = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
local many = math.max(tonumber(ARGV[2]), tonumber(redis.call('GET', KEYS[3]) or 0))
redis.call('SET', KEYS[3], many, 'PX', 60000)
if redis.call('ZCARD', KEYS[2]) < many and now - tonumber(first[2]) < tonumber(ARGV[3]) then return 0 end
redis.call('SET', KEYS[1], ARGV[5] == '1' and ARGV[4] or string.format('%.0f', now))
redis.call('DEL', KEYS[2], KEYS[3])
if ARGV[5] == '1' then redis.call('DEL', KEYS[4]) end
return 1
