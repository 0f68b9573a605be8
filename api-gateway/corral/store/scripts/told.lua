-- What the scripts share that count use: they tell all gateways when it has grown by a part of a limit, so that each knows
-- what others admitted when the store is lost. They read the rest each two seconds.
--
-- A message is: us until the scope's rate is whole, its leases, tokens of the window, day, its tokens, month, its tokens,
-- the scope's name. Less than is known says nothing.
local PARTS, PARTS_AT_ONCE, CHANNEL = 40, 20, P .. 'used'
local PAUSE, AT_ONCE, READ = 100000, 2000000, 2000

local function grown(before, after, limit, parts)
  return limit > 0 and math.floor(after * parts / limit) > math.floor(before * parts / limit)
end

-- Whether what falls again, and so crosses the same line time and again, is told that it has grown: 20 times at once and
-- then 10 times a second, or where it is a part more than all that was told since others have read it.
local function news(now, kind, name, before, after, limit, parts)
  if not grown(before, after, limit, parts) then return false end
  local key = P .. 'told:' .. kind .. ':' .. name
  local due, most = string.match(redis.call('GET', key) or '', '(%d+) (%d+)')
  due, most = math.max(now, tonumber(due or now)) + PAUSE, tonumber(most or 0)
  if after < most + limit / parts and due - now > AT_ONCE then return false end
  due, most = math.min(due, now + AT_ONCE), math.max(most, after)
  redis.call('SET', key, string.format('%.0f %.0f', due, most), 'PX', READ)
  return true
end

local function tell(name, whole, leases, window, day, of_day, month, of_month)
  local numbers = string.format('%.0f %.0f %.0f %.0f %.0f %.0f %.0f ', whole, leases, window, day, of_day, month, of_month)
  redis.call('PUBLISH', CHANNEL, numbers .. name)
end
