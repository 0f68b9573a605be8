-- Have a store that is another server with the same data, which may lack what was acknowledged last, be told anew.
--
-- KEYS  1 epoch      2.. grants, those of slots, and what names the store in a rebuild
-- ARGV  1 the epoch of the server that was there before: with another one it has been told already
-- Returns 1 where it is to be told.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', unpack(KEYS))
return 1
