-- End requests: each slot goes to the first who may use it, a ticket is given up.
--
-- ARGV  1 gateway  2.. ids; "read ID": the prompt has been read, and the slot is kept
-- Returns how many held a slot. In a store that does not grant yet nobody gets what comes free: it has yet to hear of all
-- that runs.
local held, grants = 0, redis.call('EXISTS', P .. 'slots-grant') == 1
for at = 2, #ARGV do
  local id = ARGV[at]
  local reader = string.match(id, '^read (%S+)$')
  if reader then
    local text = redis.call('HGET', P .. 'held:' .. ARGV[1], reader)
    if text and string.match(text, '^g .* 1$') then
      redis.call('HSET', P .. 'held:' .. ARGV[1], reader, string.sub(text, 1, -2) .. '0')
      local node = words(text)[4]
      redis.call('HINCRBY', P .. 'busy:' .. node, 'long', -1)
      if grants then serve_node(node) end
    end
  else
    local node, model = take_back(ARGV[1], id)
    if node then
      held = held + 1
      if grants then serve_node(node, model) end
    end
  end
end
return held
