-- Tell of what a gateway holds that the store knows nothing of, or something else: it was flushed, has taken the slots
-- back, or the gateway has used its own share while the store was away.
--
-- ARGV  1 gateway  2.. in groups of five: id, model, kind, node of a slot or "" of a ticket, of a slot: "1" where its
--       prompt is still read; of a ticket: start time, us, and the nodes that it prefers
-- A request that runs does run: it is counted where it does, though the place may then have more than its slots.
redis.call('ZADD', P .. 'live', 'NX', now + LEASE, ARGV[1])
for at = 2, #ARGV, 5 do
  local id, model, kind, node, last = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  local text = redis.call('HGET', P .. 'held:' .. ARGV[1], id)
  if node ~= '' then
    if not text or runs_of(text) ~= node .. ' ' .. last then
      take_back(ARGV[1], id)
      give(ARGV[1], id, model, kind, node, last == '1')
    end
  elseif not text then
    redis.call('ZADD', P .. 'wait:' .. model .. ':' .. kind, words(last)[1], ARGV[1] .. ' ' .. id)
    redis.call('SADD', P .. 'queued', model)
    redis.call('HSET', P .. 'held:' .. ARGV[1], id, table.concat({ 't', model, kind, last }, ' '))
  end
end
return 1
