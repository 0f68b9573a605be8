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

-- `limits` are the scope's: requests at once, tokens a minute, a day, a month (0: none); `numbers` what it has of them now.
-- What falls again may cross the same line time and again, as a rate (`always`) can not. That is told 20 times at once, and
-- then 10 times a second, unless it is a part more than all that was told since others have read it.
local function tell(now, name, always, whole, limits, numbers, day, month)
  local key = P .. 'told:' .. name
  local said = { string.match(redis.call('GET', key) or '', '(%d+) (%d+) (%d+) (%d+) (%d+)') }
  local more = always
  for at, limit in ipairs(limits) do
    said[at] = tonumber(said[at] or 0)
    more = more or limit > 0 and numbers[at] >= said[at] + limit / (at == 1 and PARTS_AT_ONCE or PARTS)
    said[at] = math.max(said[at], numbers[at])
  end
  local due = math.max(now, tonumber(said[5] or now)) + PAUSE
  if not more and due - now > AT_ONCE then return end
  said[5] = math.min(due, now + AT_ONCE)
  redis.call('SET', key, string.format('%.0f %.0f %.0f %.0f %.0f', unpack(said)), 'PX', READ)
  local parts = { whole, numbers[1], numbers[2], day, numbers[3], month, numbers[4] }
  local text = string.format('%.0f %.0f %.0f %.0f %.0f %.0f %.0f ', unpack(parts))
  redis.call('PUBLISH', CHANNEL, text .. name)
end
