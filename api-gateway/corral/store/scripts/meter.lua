-- What the scripts of metered limits share; it stands before each of them.
--
-- A scope is what limits hang on: a key, or the tenant that it belongs to. The use of one scope is one packed list:
-- {day, tokens of the day, month, tokens of the month, number of the newest slice, us until which the rate pays off a
-- debt, tokens of each slice by number modulo SLICES}. Days and months are UTC's, by the store's own clock.
-- Tokens per minute are a sliding window of slices of five seconds: those of the last minute and the one under way.
local MINUTE, DAY = 60000000, 86400000000
local SLICE, SLICES = 5000000, 13
local KEPT = { day = 90000000, month = 2764800000, window = 180000 }
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local slice = math.floor(now / SLICE)
local today = math.floor(now / DAY)

-- The first day of a month, counted in days since 1970 and months since March of the year 0.
local function first_of(month)
  local year, left = math.floor(month / 12), month % 12
  local era = math.floor(year / 400)
  local of_era = year - era * 400
  local days = of_era * 365 + math.floor(of_era / 4) - math.floor(of_era / 100) + math.floor((153 * left + 2) / 5)
  return era * 146097 + days - 719468
end

local function month_of(day)
  local month = math.floor((day + 719468) / 30.436875)
  while first_of(month) > day do month = month - 1 end
  while first_of(month + 1) <= day do month = month + 1 end
  return month
end

local this_month = month_of(today)

-- When the rate of a scope is whole again, us. So far ahead no debt is: the clock was set back.
local function arrival_of(key)
  local known = tonumber(redis.call('GET', key) or now)
  if known > now + 5 * MINUTE then
    known = now + MINUTE
    redis.call('SET', key, string.format('%.0f', known), 'PX', 61000)
  end
  return math.max(now, known)
end

local function load(key)
  local packed = redis.call('GET', key)
  local use
  if packed then
    use = cmsgpack.unpack(packed)
  else
    use = { today, 0, this_month, 0, slice, 0 }
    for place = 7, 6 + SLICES do use[place] = 0 end
  end
  if use[5] > slice then
    -- The clock was set back: what counts is how long ago it was, as if the clock had gone on.
    local ago = {}
    for back = 0, SLICES - 1 do ago[back] = use[7 + (use[5] - back) % SLICES] end
    for back = 0, SLICES - 1 do use[7 + (slice - back) % SLICES] = ago[back] end
    use[5], use[6] = slice, math.max(0, use[6] - (use[5] - slice) * SLICE)
  end
  if use[1] < today then use[1], use[2] = today, 0 end
  if use[3] < this_month then use[3], use[4] = this_month, 0 end
  for number = math.max(use[5] + 1, slice - SLICES + 1), slice do use[7 + number % SLICES] = 0 end
  use[5] = math.max(use[5], slice)
  return use
end

-- Forgets no sooner than what is limited ends.
local function save(key, use, daily, monthly)
  local kept = monthly > 0 and KEPT.month or daily > 0 and KEPT.day or KEPT.window
  kept = math.max(kept, (use[6] - now) / 1000 + KEPT.window)
  redis.call('SET', key, cmsgpack.pack(use), 'PX', string.format('%.0f', kept))
end

local function window(use)
  local sum = 0
  for place = 7, 6 + SLICES do sum = sum + use[place] end
  return sum
end

-- us until a slice has left the window
local function leaves(number) return (number + SLICES) * SLICE - now end

-- us until at most `most` tokens are in the window
local function until_at_most(use, most)
  local sum = window(use)
  for number = use[5] - SLICES + 1, use[5] do
    if sum <= most then break end
    sum = sum - use[7 + number % SLICES]
    if sum <= most then return math.max(leaves(number), use[6] - now) end
  end
  return math.max(0, use[6] - now)
end

-- us until nothing is in the window
local function until_whole(use)
  for number = use[5], use[5] - SLICES + 1, -1 do
    if use[7 + number % SLICES] > 0 then return math.max(leaves(number), use[6] - now) end
  end
  return math.max(0, use[6] - now)
end
