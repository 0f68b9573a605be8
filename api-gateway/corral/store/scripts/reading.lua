-- What gateways tell each other of the prompts that runners read for them (`corral.store.reading`).
--
-- ARGV  1 P, the store's prefix      2 the gateway      3 its word, or ""      4 for how long a word holds, ms
-- Returns of each other gateway's word how long ago it was said, us, and the word.
local key, gateway, text, lasts = ARGV[1] .. 'reading', ARGV[2], ARGV[3], tonumber(ARGV[4])
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
if text == '' then
  redis.call('HDEL', key, gateway)
else
  redis.call('HSET', key, gateway, string.format('%.0f ', now) .. text)
  redis.call('PEXPIRE', key, lasts * 5)
end
local others = {}
local all = redis.call('HGETALL', key)
for at = 1, #all, 2 do
  local said, word = string.match(all[at + 1], '^(%d+) (.*)$')
  local ago = now - tonumber(said)
  if ago > lasts * 1000 or ago < 0 then
    redis.call('HDEL', key, all[at]) -- it ended, or the clock was set back
  elseif all[at] ~= gateway then
    others[#others + 1] = ago
    others[#others + 1] = word
  end
end
return others
