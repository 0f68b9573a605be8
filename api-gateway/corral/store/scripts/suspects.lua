-- Prompts that were present at a runner's crash, and who of them is to blame. P is the store's prefix.
--
--   crashes            counter: each crash has a number
--   crash:MODEL NODE   hash: number and time (us) of that runner's last crash
--   crash-of:NUMBER    hash, prompt -> "1" where it had a token in that attempt, else "0"
--   suspect:PROMPT     sorted set: the crashes that it was present at and nobody else is blamed for, by time, us
--   suspects, refused  sorted sets of prompts, by until when they are (us)
--   trial:MODEL NODE   the suspect whose attempt has that runner, as suspects go, to itself
-- A prompt is a fingerprint. What changes is told on the channel ARGV[2]: "suspect PROMPT", "refused PROMPT",
-- "clear PROMPT", "free".
--
-- ARGV  1 what to do  2 channel  3..
local KEEP, GRACE, RECENT = 600, 250000, 60
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local channel = ARGV[2]

local function tell(what) redis.call('PUBLISH', channel, what) end

local function count(prompt) return redis.call('ZCARD', P .. 'suspect:' .. prompt) end

local function clear(prompt)
  redis.call('DEL', P .. 'suspect:' .. prompt)
  redis.call('ZREM', P .. 'suspects', prompt)
  tell('clear ' .. prompt)
end

-- Refuse a prompt. What it was present at is nobody else's fault.
local function blame(prompt)
  for _, number in ipairs(redis.call('ZRANGE', P .. 'suspect:' .. prompt, 0, -1)) do
    for _, other in ipairs(redis.call('HKEYS', P .. 'crash-of:' .. number)) do
      if other ~= prompt and redis.call('ZREM', P .. 'suspect:' .. other, number) == 1 and count(other) == 0 then
        clear(other)
      end
    end
  end
  redis.call('DEL', P .. 'suspect:' .. prompt)
  redis.call('ZREM', P .. 'suspects', prompt)
  redis.call('ZADD', P .. 'refused', string.format('%.0f', now + KEEP * 1000000), prompt)
  tell('refused ' .. prompt)
end

-- Who is suspect or refused no longer.
local function forget()
  for _, what in ipairs({ 'suspects', 'refused' }) do
    redis.call('ZREMRANGEBYSCORE', P .. what, '-inf', string.format('%.0f', now))
  end
end

local act = {}

-- A prompt was present at a crash: 3 prompt, 4 model, 5 node, 6 us since its attempt began, 7 "1" where it had a token.
-- Returns {the crash's number, crashes that it is suspect for}.
function act.crash(prompt, model, node, age, got_on)
  forget()
  local sent, runner, own = now - tonumber(age), P .. 'crash:' .. model .. ' ' .. node, P .. 'suspect:' .. prompt
  local number, at = unpack(redis.call('HMGET', runner, 'number', 'at'))
  -- Others tell of the same crash a little later; no runner is loaded and crashes again in that time.
  if not number or (now > tonumber(at) + GRACE and sent >= tonumber(at)) then
    number = string.format('%d', redis.call('INCR', P .. 'crashes'))
    redis.call('HSET', runner, 'number', number, 'at', string.format('%.0f', now))
    redis.call('EXPIRE', runner, RECENT)
  end
  -- An attempt that ran at the earlier crash already, elsewhere, says nothing more by its own: who is in many requests
  -- at once is at many crashes.
  local last = redis.call('ZREVRANGE', own, 0, 0, 'WITHSCORES')
  if last[1] and last[1] ~= number and sent <= tonumber(last[2]) then return { number, count(prompt) } end
  local members = P .. 'crash-of:' .. number
  if redis.call('HGET', members, prompt) ~= '0' then redis.call('HSET', members, prompt, got_on) end
  redis.call('EXPIRE', members, KEEP)
  redis.call('ZADD', own, string.format('%.0f', now), number)
  redis.call('EXPIRE', own, KEEP)
  redis.call('ZADD', P .. 'suspects', string.format('%.0f', now + KEEP * 1000000), prompt)
  tell('suspect ' .. prompt)
  return { number, count(prompt) }
end

-- Of those at a crash the one is to blame that was at another one too; of several the one that had no token this time.
local function decide(number)
  local stuck, got_on = {}, {}
  local members = redis.call('HGETALL', P .. 'crash-of:' .. number)
  for at = 1, #members, 2 do
    if redis.call('ZSCORE', P .. 'suspect:' .. members[at], number) and count(members[at]) > 1 then
      local among = members[at + 1] == '1' and got_on or stuck
      among[#among + 1] = members[at]
    end
  end
  local candidates = #stuck > 0 and stuck or got_on
  if #candidates == 1 then blame(candidates[1]) end
end

-- All have told of a crash: 3 its number, 4 the prompt of who asks. Returns {1 where that is refused, crashes that it is
-- suspect for}.
function act.judge(number, prompt)
  decide(number)
  local till = tonumber(redis.call('ZSCORE', P .. 'refused', prompt) or 0)
  return { till > now and 1 or 0, count(prompt) }
end

-- A runner has answered a prompt to the end: 3 prompt. That may leave one of those who were at crashes with it.
function act.clear(prompt)
  local numbers = redis.call('ZRANGE', P .. 'suspect:' .. prompt, 0, -1)
  clear(prompt)
  for _, number in ipairs(numbers) do decide(number) end
  return 1
end

-- An attempt at a suspect begins: 3 prompt, 4 model, 5 node. Returns 1, or 0 where another one has the runner.
function act.try(prompt, model, node)
  local key = P .. 'trial:' .. model .. ' ' .. node
  local other = redis.call('GET', key)
  if other and other ~= prompt then return 0 end
  redis.call('SET', key, prompt, 'EX', RECENT) -- of a gateway that died, nobody says that it is over
  return 1
end

-- It got on, or is over: the same.
function act.leave(prompt, model, node)
  local key = P .. 'trial:' .. model .. ' ' .. node
  if redis.call('GET', key) == prompt then
    redis.call('DEL', key)
    tell('free')
  end
  return 1
end

-- All that is known, for who has not heard of it: {"suspect PROMPT" or "refused PROMPT", us for which it still is so, ..}.
function act.recall()
  forget()
  local found = {}
  for _, what in ipairs({ 'suspects', 'refused' }) do
    local word = what == 'suspects' and 'suspect ' or 'refused '
    local prompts = redis.call('ZRANGE', P .. what, 0, -1, 'WITHSCORES')
    for at = 1, #prompts, 2 do
      found[#found + 1] = word .. prompts[at]
      found[#found + 1] = tonumber(prompts[at + 1]) - now
    end
  end
  return found
end

return act[ARGV[1]](unpack(ARGV, 3))
