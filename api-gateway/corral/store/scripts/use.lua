-- Read the use of scopes.
--
-- KEYS  of each scope: tokens
-- Returns {day, month, of each scope: tokens of the window, of the day, of the month}
local answer = { today, this_month }
for _, key in ipairs(KEYS) do
  local use = load(key)
  answer[#answer + 1], answer[#answer + 2], answer[#answer + 3] = window(use), use[2], use[4]
end
return answer
