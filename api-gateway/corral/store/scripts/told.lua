-- What the scripts share that count use: they tell all gateways when it has grown by a part of a limit, so that each knows
-- what others admitted when the store is lost. They read the rest each two seconds.
--
-- A message is: us until the scope's rate is whole, its leases, tokens of the window, day, its tokens, month, its tokens,
-- the scope's name. Less than is known says nothing.
local PARTS, CHANNEL = 40, P .. 'used'
local OF_SUM, OF_LEASES, AT_ONCE, READ = 100000, 500000, 2000000, 2000

local function grown(before, after, part)
  return part > 0 and math.floor(after / part) > math.floor(before / part)
end

-- Whether what falls again, and so crosses the same line time and again, is told that it has grown: for two seconds each
-- `pause` at once, and each `pause` from then on, or where it is a part more than all that was told since others read it.
local function news(now, kind, name, before, after, part, pause)
  if not grown(before, after, part) then return false end
  local key = P .. 'told:' .. kind .. ':' .. name
  local due, most = string.match(redis.call('GET', key) or '', '(%d+) (%d+)')
  due, most = tonumber(due or now), tonumber(most or 0)
  if due < now or due > now + AT_ONCE then due = now end -- it was long ago, or the clock was set back
  due = due + pause
  if after < most + part and due - now > AT_ONCE then return false end
  due, most = math.min(due, now + AT_ONCE), math.max(most, after)
  redis.call('SET', key, string.format('%.0f %.0f', due, most), 'PX', READ)
  return true
end

-- One request at once of few is not told: most keys have no more, and each of theirs would be.
local function at_once(now, name, running, limit)
  if limit == 0 then return false end
  return news(now, 'leases', name, running, running + 1, math.max(2, math.floor(limit / 20)), OF_LEASES)
end

local function tell(name, whole, leases, window, day, of_day, month, of_month)
  local numbers = string.format('%.0f %.0f %.0f %.0f %.0f %.0f %.0f ', whole, leases, window, day, of_day, month, of_month)
  redis.call('PUBLISH', CHANNEL, numbers .. name)
end
