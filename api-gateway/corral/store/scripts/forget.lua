-- Have a store that is another server with the same data, which may lack what was acknowledged last, be told anew.
--
-- KEYS  1 epoch      2 grants      3 grants of slots
-- ARGV  1 the epoch of the server that was there before: with another one it has been told already
-- Returns 1 where it is to be told.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
return 1
