-- Admit one request of a key that has no limit but requests per minute and concurrency, in one call.
--
-- KEYS  1 rate: theoretical arrival time, us (GCRA)       2 leases: sorted set, request id -> expiry, us
--       3 grants: absent in a store that has lost what it knew      4 active: sorted set, scope -> last use, us
-- ARGV  1 requests per minute (0: no limit)               2 concurrency (0: no limit)
--       3 lease, us      4 the key's name                 5 request id
-- Returns 0 (REBUILD) where it does not grant, else {admitted 0|1, refused by 0 none|1 rate|2 concurrency,
-- requests left, us until the rate is whole again, us until a retry can succeed (of concurrency gateways know better)}
--
-- Time is the store's own, so that gateways need not agree on the clock. A call that repeats a request id
-- which holds a lease is answered like the first and counts once.
if redis.call('EXISTS', KEYS[3]) == 0 then return 0 end
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local rpm, concurrency, lease = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local id = ARGV[5]
local MINUTE = 60000000

local arrival, running = now, 0
if rpm > 0 then
  arrival = tonumber(redis.call('GET', KEYS[1]) or now)
  -- So far ahead no debt is: the clock was set back.
  if arrival > now + 5 * MINUTE then
    arrival = now + MINUTE
    redis.call('SET', KEYS[1], string.format('%.0f', arrival), 'PX', 61000)
  end
  arrival = math.max(now, arrival)
end
local interval = rpm > 0 and MINUTE / rpm or 0
local function left(after) return rpm > 0 and math.floor((MINUTE - (after - now)) / interval + 0.001) or 0 end

if concurrency > 0 then
  if redis.call('ZSCORE', KEYS[2], id) then
    return {1, 0, left(arrival), arrival - now, 0}
  end
  running = redis.call('ZCARD', KEYS[2])
  if running >= concurrency then
    redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
    running = redis.call('ZCARD', KEYS[2])
    if running >= concurrency then
      return {0, 2, left(arrival), arrival - now, 1000000}
    end
  end
end

local quickly = false
if rpm > 0 then
  local after = arrival + interval
  if after - now > MINUTE then
    return {0, 1, 0, arrival - now, math.ceil(after - now - MINUTE)}
  end
  redis.call('SET', KEYS[1], string.format('%.0f', after), 'PX', math.ceil((after - now) / 1000) + 1000)
  quickly = grown(arrival, after, MINUTE / PARTS)
  arrival = after
end
if concurrency > 0 then
  redis.call('ZADD', KEYS[2], now + lease, id)
  redis.call('PEXPIRE', KEYS[2], math.ceil(lease / 1000) * 2)
end
if rpm > 0 or concurrency > 0 then redis.call('ZADD', KEYS[4], now, ARGV[4]) end
if at_once(now, ARGV[4], running, concurrency) or quickly then
  tell(ARGV[4], arrival - now, running + 1, 0, 0, 0, 0, 0)
end
return {1, 0, left(arrival), arrival - now, 0}
