-- Read the use of scopes.
--
-- KEYS  1 epoch      of each scope: tokens, rate, leases
-- ARGV  1 the epoch that the gateway knows
-- Returns {day, month, of each scope: tokens of the window, of the day, of the month, us until its rate is whole, leases},
-- nil in a store that has lost what it knew: what it has would be taken for all that was used.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
local answer = { today, this_month }
for key = 2, #KEYS, 3 do
  local use = load(KEYS[key])
  local whole = math.ceil(arrival_of(KEYS[key + 1]) - now)
  for _, value in ipairs({ window(use), use[2], use[4], whole, redis.call('ZCOUNT', KEYS[key + 2], now, '+inf') }) do
    answer[#answer + 1] = value
  end
end
return answer
