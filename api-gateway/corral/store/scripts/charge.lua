-- Count requests that were admitted while the store was away.
--
-- KEYS  1 rate: theoretical arrival time, us (GCRA)      2 epoch: absent in a store that has lost what it knew
--       3 active: sorted set, scope -> last use, us
-- ARGV  1 requests per minute      2 how many      3 scope's name
-- Returns 0 (REBUILD) without an epoch, else 1.
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local MINUTE = 60000000
local arrival = tonumber(redis.call('GET', KEYS[1]) or now)
if arrival > now + 5 * MINUTE then arrival = now + MINUTE end -- the clock was set back
-- What was admitted more than a minute ago has run off: callers that kept to the limit owe a minute at most.
local before = math.max(now, arrival)
arrival = math.min(before + ARGV[2] * MINUTE / ARGV[1], now + MINUTE)
redis.call('SET', KEYS[1], string.format('%.0f', arrival), 'PX', math.ceil((arrival - now) / 1000) + 1000)
redis.call('ZADD', KEYS[3], now, ARGV[3])
if grown(before, arrival, MINUTE / PARTS) then tell(ARGV[3], arrival - now, 0, 0, 0, 0, 0, 0) end
return 1
