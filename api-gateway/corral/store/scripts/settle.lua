-- Settle requests of one key: their leases end, and what they used takes the place of what was reserved.
--
-- KEYS  1 epoch      2 active      of each scope: leases, tokens, rate
-- ARGV  1 what stands before a reservation's id      2 for how long a settled request is known, ms
--       of each scope: its name, requests a minute, tokens a minute, a day, a month (0: no limit)
--       of each request: its id, tokens it used, tokens the store was heard to have reserved; not heard:
--       less the number of requests that it is, -1
-- Returns 0 (REBUILD) without an epoch, else 1.
--
-- A request counts once, however often it is settled. One that the store knows nothing of was admitted while it was
-- away (all of it counts, as a request too), or reserved before the store lost what it knew: gateways have then told what it said, and
-- the difference counts. A reservation counts in its own slice, day and month: one that is over is not corrected.
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local scopes = {}
for number = 1, (#KEYS - 2) / 3 do
  local key, arg = number * 3, number * 5 - 3
  scopes[number] = {
    name = ARGV[arg + 1], leases = KEYS[key], tokens = KEYS[key + 1], rate = KEYS[key + 2],
    rpm = tonumber(ARGV[arg + 2]), tpm = tonumber(ARGV[arg + 3]), daily = tonumber(ARGV[arg + 4]),
    monthly = tonumber(ARGV[arg + 5]),
  }
end

local changes, ids, requests = {}, {}, 0
for arg = #scopes * 5 + 3, #ARGV, 3 do
  ids[#ids + 1] = ARGV[arg]
  local held = ARGV[1] .. ARGV[arg]
  local value = redis.call('GET', held)
  if value ~= '-' then
    local used, heard = tonumber(ARGV[arg + 1]), tonumber(ARGV[arg + 2])
    local change = { by = used - math.max(0, heard), slice = slice, day = today, month = this_month }
    if value then
      local cost, at, day, month = string.match(value, '(%d+) (%d+) (%d+) (%d+)')
      change = { by = used - tonumber(cost), slice = tonumber(at), day = tonumber(day), month = tonumber(month) }
    elseif heard < 0 then
      requests = requests - heard
    end
    if change.by ~= 0 then changes[#changes + 1] = change end
    redis.call('SET', held, '-', 'PX', ARGV[2])
  end
end

for _, scope in ipairs(scopes) do
  for first = 1, #ids, 1000 do
    redis.call('ZREM', scope.leases, unpack(ids, first, math.min(first + 999, #ids)))
  end
  if requests > 0 or #changes > 0 then redis.call('ZADD', KEYS[2], now, scope.name) end
  local arrival, more = now, false
  if requests > 0 and scope.rpm > 0 then
    local before = arrival_of(scope.rate)
    arrival = math.min(before + requests * MINUTE / scope.rpm, now + MINUTE)
    more = grown(before, arrival, MINUTE / PARTS)
    redis.call('SET', scope.rate, string.format('%.0f', arrival), 'PX', math.ceil((arrival - now) / 1000) + 1000)
  end
  if #changes > 0 then
    local use = load(scope.tokens)
    local in_window, of_day, of_month = window(use), use[2], use[4]
    for _, change in ipairs(changes) do
      local by = change.by
      if change.day == today then use[2] = math.max(0, use[2] + by) end
      if change.month == this_month then use[4] = math.max(0, use[4] + by) end
      if by < 0 and change.slice > slice - SLICES and change.slice <= slice then
        local place = 7 + change.slice % SLICES
        use[place] = math.max(0, use[place] + by)
      elseif by > 0 then
        local place = 7 + slice % SLICES
        local over = scope.tpm > 0 and math.min(by, window(use) + by - scope.tpm) or 0
        use[place] = use[place] + by
        -- More than a minute holds is paid off in the minutes after this one.
        if over > 0 then use[6] = math.max(use[6], now + MINUTE) + over * MINUTE / scope.tpm end
      end
    end
    use[6] = math.floor(use[6])
    save(scope.tokens, use, scope.daily, scope.monthly)
    more = news(now, 'window', scope.name, in_window, window(use), scope.tpm / PARTS, OF_SUM) or more
    more = news(now, 'day', scope.name, of_day, use[2], scope.daily / PARTS, OF_SUM) or more
    more = news(now, 'month', scope.name, of_month, use[4], scope.monthly / PARTS, OF_SUM) or more
    if more then tell(scope.name, arrival - now, 0, window(use), use[1], use[2], use[3], use[4]) end
  elseif more then
    tell(scope.name, arrival - now, 0, 0, 0, 0, 0, 0)
  end
end
return 1
