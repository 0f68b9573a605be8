-- Admit one request of a key that has limits of tokens, or whose tenant has limits: all of them, in one call.
--
-- KEYS  1 grants, 2 epoch: absent in a store that has lost what it knew
--       3 active: sorted set, scope -> last use, us
--       of each scope: rate: theoretical arrival time, us (GCRA); leases: sorted set, request id -> expiry, us;
--       tokens: see meter.lua
-- ARGV  1 lease, us      2 how long a reservation is known, ms      3 what stands before a reservation's id
--       of each scope: its name, requests a minute, concurrency, tokens a minute, a day, a month (0: no limit)
--       the last two: request id, tokens to reserve; with "-" before them: it runs already, whatever the limits
-- Returns 0 (REBUILD) where it does not grant (or has no epoch, for what runs already), else a list:
--       admitted 0|1; the limit that refuses, and us until a retry can succeed;
--       of requests a minute, then of tokens: which limit refuses, else has the least left, how much, us until it is
--       whole again;
--       the store's day and month;
--       of each scope: us until its rate is whole, tokens of the window, of the day, of the month
--       A limit is its scope's number (0, 1) times 5 plus 1 requests a minute, 2 concurrency, 3 tokens a minute,
--       4 a day, 5 a month; 0 is none.
--
-- A reservation has a key of its own, whose name is made here (there is no cluster mode): "tokens slice day
-- month", or "-" for a request that was settled. A call that repeats a request id is answered like the first and counts once.
local lease, id, cost = tonumber(ARGV[1]), ARGV[#ARGV - 1], math.abs(tonumber(ARGV[#ARGV]))
local runs = string.sub(ARGV[#ARGV], 1, 1) == '-'
if redis.call('EXISTS', runs and KEYS[2] or KEYS[1]) == 0 then return 0 end
local held = ARGV[3] .. id
local repeated = redis.call('GET', held)
local refused, retry = 0, 0
local scopes = {}

local function refuse(limit, after)
  if refused == 0 or after > retry then refused, retry = limit, after end
end

for number = 1, (#KEYS - 3) / 3 do
  local key, arg, base = number * 3 + 1, number * 6 - 3, number * 5 - 5
  local scope = {
    base = base, name = ARGV[arg + 1], rate = KEYS[key], leases = KEYS[key + 1], tokens = KEYS[key + 2],
    rpm = tonumber(ARGV[arg + 2]), concurrency = tonumber(ARGV[arg + 3]), tpm = tonumber(ARGV[arg + 4]),
    daily = tonumber(ARGV[arg + 5]), monthly = tonumber(ARGV[arg + 6]), arrival = now,
  }
  scopes[number] = scope
  scope.use = load(scope.tokens)
  local use = scope.use
  if scope.rpm > 0 then
    scope.interval = MINUTE / scope.rpm
    scope.arrival = arrival_of(scope.rate)
    local after = scope.arrival + scope.interval - now - MINUTE
    if after > 0 then refuse(base + 1, after) end
  end
  scope.running = scope.concurrency > 0 and redis.call('ZCARD', scope.leases) or 0
  if scope.concurrency > 0 and scope.running >= scope.concurrency then
    redis.call('ZREMRANGEBYSCORE', scope.leases, '-inf', now)
    scope.running = redis.call('ZCARD', scope.leases)
    if scope.running >= scope.concurrency then
      refuse(base + 2, 1000000) -- gateways know better how long requests take
    end
  end
  if cost > 0 then
    if scope.tpm > 0 and (window(use) + cost > scope.tpm or use[6] > now) then
      refuse(base + 3, until_at_most(use, scope.tpm - cost))
    end
    if scope.daily > 0 and use[2] + cost > scope.daily then
      refuse(base + 4, (today + 1) * DAY - now)
    end
    if scope.monthly > 0 and use[4] + cost > scope.monthly then
      refuse(base + 5, first_of(this_month + 1) * DAY - now)
    end
  end
end

if repeated or runs then refused, retry = 0, 0 end
if refused == 0 and not repeated then
  for _, scope in ipairs(scopes) do
    local use, more = scope.use, false
    if scope.rpm > 0 then
      more = grown(scope.arrival, scope.arrival + scope.interval, MINUTE / PARTS)
      scope.arrival = scope.arrival + scope.interval
      local kept = math.ceil((scope.arrival - now) / 1000) + 1000
      redis.call('SET', scope.rate, string.format('%.0f', scope.arrival), 'PX', kept)
    end
    if scope.concurrency > 0 then
      redis.call('ZADD', scope.leases, now + lease, id)
      redis.call('PEXPIRE', scope.leases, math.ceil(lease / 1000) * 2)
      more = at_once(now, scope.name, scope.running, scope.concurrency) or more
      scope.running = scope.running + 1
    end
    if cost > 0 then
      local place = 7 + slice % SLICES
      local sum = scope.tpm > 0 and window(use) or 0
      more = news(now, 'window', scope.name, sum, sum + cost, scope.tpm / PARTS, OF_SUM) or more
      more = news(now, 'day', scope.name, use[2], use[2] + cost, scope.daily / PARTS, OF_SUM) or more
      more = news(now, 'month', scope.name, use[4], use[4] + cost, scope.monthly / PARTS, OF_SUM) or more
      use[2], use[4], use[place] = use[2] + cost, use[4] + cost, use[place] + cost
      save(scope.tokens, use, scope.daily, scope.monthly)
    end
    if cost > 0 or scope.rpm > 0 or scope.concurrency > 0 then redis.call('ZADD', KEYS[3], now, scope.name) end
    if more then
      tell(scope.name, scope.arrival - now, scope.running, window(use), use[1], use[2], use[3], use[4])
    end
  end
  redis.call('SET', held, string.format('%.0f %.0f %.0f %.0f', cost, slice, today, this_month), 'PX',
    cost > 0 and ARGV[2] or 60000)
end

-- Which of a kind is told: what refuses, as the wait is until that lets in, else what has the least left.
local kind = refused % 5
local of_requests = kind == 1 and refused or 0
local of_tokens = (kind == 0 or kind > 2) and refused or 0
local requests, tokens = { 0, 0, 0 }, { 0, 0, 0 }
local function least(of, only, limit, left, whole)
  if only > 0 and limit ~= only then return end
  left = math.max(0, math.floor(left + 0.001))
  if of[1] == 0 or left < of[2] or (left == of[2] and whole > of[3]) then of[1], of[2], of[3] = limit, left, whole end
end
for _, scope in ipairs(scopes) do
  local use = scope.use
  if scope.rpm > 0 then
    local whole = scope.arrival - now
    least(requests, of_requests, scope.base + 1, (MINUTE - whole) / scope.interval, whole)
  end
  if scope.tpm > 0 then
    least(tokens, of_tokens, scope.base + 3, use[6] > now and 0 or scope.tpm - window(use), until_whole(use))
  end
  if scope.daily > 0 then
    least(tokens, of_tokens, scope.base + 4, scope.daily - use[2], (today + 1) * DAY - now)
  end
  if scope.monthly > 0 then
    least(tokens, of_tokens, scope.base + 5, scope.monthly - use[4], first_of(this_month + 1) * DAY - now)
  end
end
local answer = {
  refused == 0 and 1 or 0, refused, math.ceil(retry), requests[1], requests[2], math.ceil(requests[3]),
  tokens[1], tokens[2], math.ceil(tokens[3]), today, this_month,
}
for _, scope in ipairs(scopes) do
  for _, value in ipairs({ math.ceil(scope.arrival - now), window(scope.use), scope.use[2], scope.use[4] }) do
    answer[#answer + 1] = value
  end
end
return answer
