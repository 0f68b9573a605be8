-- Read the use of scopes.
--
-- KEYS  of each scope: tokens, rate, leases
-- Returns {day, month, of each scope: tokens of the window, of the day, of the month, us until its rate is whole, leases}
local answer = { today, this_month }
for key = 1, #KEYS, 3 do
  local use = load(KEYS[key])
  local whole = math.ceil(arrival_of(KEYS[key + 1]) - now)
  for _, value in ipairs({ window(use), use[2], use[4], whole, redis.call('ZCOUNT', KEYS[key + 2], now, '+inf') }) do
    answer[#answer + 1] = value
  end
end
return answer
