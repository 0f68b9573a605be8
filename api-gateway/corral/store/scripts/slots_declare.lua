-- Tell of what a gateway holds that the store knows nothing of: it was flushed, or has taken the slots back.
--
-- ARGV  1 gateway  2.. in groups of five: id, model, kind, node of a slot or "" of a ticket, of a slot: "1" where its
--       prompt is still read; of a ticket: start time, us
-- A request that runs does run: it is counted, though the place may then have more than its slots.
for at = 2, #ARGV, 5 do
  local id, model, kind, node, last = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  if redis.call('HEXISTS', P .. 'held:' .. ARGV[1], id) == 0 then
    if node ~= '' then
      give(ARGV[1], id, model, kind, node, last == '1')
    else
      redis.call('ZADD', P .. 'wait:' .. model .. ':' .. kind, last, ARGV[1] .. ' ' .. id)
      redis.call('SADD', P .. 'queued', model)
      redis.call('HSET', P .. 'held:' .. ARGV[1], id, table.concat({ 't', model, kind, last }, ' '))
    end
  end
end
return 1
