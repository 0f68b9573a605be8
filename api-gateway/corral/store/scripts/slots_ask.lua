-- Ask for a slot.
--
-- ARGV  1 gateway  2 id  3 model  4 kind  5 key  6 cost: us of a slot  7 weight  8 "1": a batch  9 most tickets
--       10.. nodes that are preferred or avoided, and ^
-- Returns 0 (REBUILD) where it does not grant, else as `ask`.
if redis.call('EXISTS', P .. 'slots-grant') == 0 then return 0 end
return ask(ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8] == '1',
  tonumber(ARGV[9]), { unpack(ARGV, 10) })
