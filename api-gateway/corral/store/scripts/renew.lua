-- Renew the leases of requests of a scope that still run.
--
-- KEYS  1 leases: sorted set, request id -> expiry, us      2 active: sorted set, scope -> last use, us
-- ARGV  1 lease, us      2 scope's name      3.. request ids
-- Returns how many leases were alive. A lease that ran out is taken again: its request does run.
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local lease = tonumber(ARGV[1])
local alive = 0
for i = 3, #ARGV do
  alive = alive + 1 - redis.call('ZADD', KEYS[1], now + lease, ARGV[i])
end
redis.call('ZADD', KEYS[2], now, ARGV[2])
redis.call('PEXPIRE', KEYS[1], math.ceil(lease / 1000) * 2)
return alive
