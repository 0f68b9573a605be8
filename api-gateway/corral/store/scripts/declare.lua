-- Tell a store that has lost what it knew what it last said of one scope; what it knows already is never made less.
--
-- KEYS  1 active      2 rate      3 tokens      4 leases
-- ARGV  1 scope's name      2 us until its rate is whole      3, 4 its tokens a day, a month (0: no limit)
--       5 tokens of the window      6, 7 day, and its tokens      8, 9 month, and its tokens
--       10 lease, us      11.. requests that run and hold a lease
local left, tokens = tonumber(ARGV[2]), tonumber(ARGV[5])
if left > 0 then
  local arrival = math.max(now + left, arrival_of(KEYS[2]))
  redis.call('SET', KEYS[2], string.format('%.0f', arrival), 'PX', math.ceil((arrival - now) / 1000) + 1000)
end
local use = load(KEYS[3])
local place = 7 + slice % SLICES
use[place] = use[place] + math.max(0, tokens - window(use))
if tonumber(ARGV[6]) == today then use[2] = math.max(use[2], tonumber(ARGV[7])) end
if tonumber(ARGV[8]) == this_month then use[4] = math.max(use[4], tonumber(ARGV[9])) end
if window(use) + use[2] + use[4] > 0 then
  save(KEYS[3], use, tonumber(ARGV[3]), tonumber(ARGV[4]))
end
for arg = 11, #ARGV do redis.call('ZADD', KEYS[4], now + tonumber(ARGV[10]), ARGV[arg]) end
if #ARGV > 10 then redis.call('PEXPIRE', KEYS[4], math.ceil(tonumber(ARGV[10]) / 1000) * 2) end
redis.call('ZADD', KEYS[1], now, ARGV[1])
return 1
