-- While there is no leader: say where a model may be used, all of it. Ollama loads it where it is not in memory.
--
-- ARGV  1 model  2 how long a leader may say nothing, us  3.. in groups of two: node, slots
-- Returns 1, or 0 where there is a leader, or the store does not grant, or has not for so long: one that was flushed has
-- forgotten its leader as well, whose word is on its way.
--
-- Each place keeps its generation, so that the next leader's word, whoever that is, is later than this one.
local since = tonumber(redis.call('GET', P .. 'slots-grant'))
if not since or (since <= now and now - since < tonumber(ARGV[2])) then return 0 end
if redis.call('EXISTS', P .. 'leader') == 1 then return 0 end
local model, slots, changed = ARGV[1], {}, {}
for at = 3, #ARGV, 2 do slots[ARGV[at]] = tonumber(ARGV[at + 1]) end
for _, node in ipairs(redis.call('HKEYS', P .. 'places:' .. model)) do
  local place = place_of(model, node)
  if not slots[node] and place.state == 'resident' then
    stand(node, model, 'absent', place.generation, place.slots, place.step)
  end
end
for at = 3, #ARGV, 2 do
  local node, place = ARGV[at], place_of(model, ARGV[at])
  if not place or place.state ~= 'resident' or place.slots ~= slots[node] then
    stand(node, model, 'resident', place and place.generation or 0, slots[node],
      place and place.slots == slots[node] and place.step or math.floor(1e6 / slots[node] + 0.5))
    changed[#changed + 1] = node
  end
end
for _, node in ipairs(changed) do serve_node(node, model) end
return 1
