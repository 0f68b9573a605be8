-- Slots and tickets, as `corral.fleet.ledger` has them: what the scripts that change them share. P is the store's prefix.
--
--   places:MODEL   hash, node -> "state generation slots step"
--   used:MODEL     hash, node -> slots that are held
--   load:MODEL     sorted set of the nodes where it is resident, by load: used * step, and FULL more without a free slot
--   total:MODEL    slots where it is resident
--   busy:NODE      hash: requests, long prompts that are read, embeds; slots: the most that a resident model has there
--   models:NODE    set of the models that have a place there
--   wait:MODEL:K   sorted set of the tickets of a kind (0 short, 1 long, 2 embeddings; 3 to 5 the same of requests that
--                  may not use every node): "gateway id" by start time, us
--   queued         set of models with tickets
--   finish:MODEL   sorted set: when the last ticket of each key would be done, us
--   asked          hash, model -> requests that have asked for it
--   loads          hash, model -> how long a load takes, us
--   held:GATEWAY   hash, id -> "t model kind score preferred" a ticket, "g model kind node generation reads" a slot
--   live           sorted set, gateway -> when its lease ends, us
-- A name has no space: gateways, nodes and ids are made by Corral, and no model's name holds one.
--
-- Nodes that a request prefers are given by their names. One with ! before it is used only where the model is resident on
-- no other, one with ~ never; the word ^ has a request that waits wait at the head, ^N as if it had come N us ago.
--
-- A slot that is given to a ticket is told on the channel wake:GATEWAY: "id node generation".
local FULL, EMBED_SHARE, CANDIDATES, LAST_KIND = 1e12, 4, 16, 5
local SHORT, LONG, EMBED = { ['0'] = true, ['3'] = true }, { ['1'] = true, ['4'] = true }, { ['2'] = true, ['5'] = true }
local AHEAD_MAX, BATCH_LATER, LATER, TURNS = 30000000, 60000000, 500000, 100
local PICKY, SCAN = 3, 64
local LEASE, AEON = 10000000, 1e15
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]

local function words(text)
  local found = {}
  for word in string.gmatch(text, '%S+') do found[#found + 1] = word end
  return found
end

local function place_of(model, node)
  local text = redis.call('HGET', P .. 'places:' .. model, node)
  if not text then return nil end
  local state, generation, slots, step = string.match(text, '(%S+) (%d+) (%d+) (%S+)')
  return { state = state, generation = tonumber(generation), slots = tonumber(slots), step = tonumber(step) }
end

-- Put a place where its load belongs among the model's, or take it out.
local function arrange(model, node, place, used)
  if place and place.state == 'resident' then
    local load = used * place.step
    redis.call('ZADD', P .. 'load:' .. model, used < place.slots and load or load + FULL, node)
  else
    redis.call('ZREM', P .. 'load:' .. model, node)
  end
end

local function takes(node, kind)
  if SHORT[kind] then return true end
  local busy = redis.call('HMGET', P .. 'busy:' .. node, 'requests', 'long', 'embeds', 'slots')
  local function count(at) return tonumber(busy[at]) or 0 end
  if EMBED[kind] then return count(3) < math.max(1, math.floor(count(4) / EMBED_SHARE)) end
  return count(2) <= 0 or count(1) <= count(2)
end

local function find(model, kind, preferred)
  local key = P .. 'load:' .. model
  local marked, late, known = {}, {}, 0
  for _, word in ipairs(preferred) do
    local mark = string.byte(word)
    if mark == 33 or mark == 126 then
      local node = string.sub(word, 2)
      if not marked[node] and redis.call('ZSCORE', key, node) then known = known + 1 end
      marked[node] = true
      if mark == 33 then late[#late + 1] = node end
    end
  end
  local function usable(node)
    local load = redis.call('ZSCORE', key, node)
    return load and tonumber(load) < FULL and takes(node, kind)
  end
  for _, node in ipairs(preferred) do
    if not marked[node] and usable(node) then return node end
  end
  local most = known + (kind == '0' and 0 or CANDIDATES - 1)
  local nodes = redis.call('ZRANGE', key, 0, most, 'WITHSCORES')
  for at = 1, #nodes, 2 do
    if tonumber(nodes[at + 1]) >= FULL then break end
    if not marked[nodes[at]] and takes(nodes[at], kind) then return nodes[at] end
  end
  if #late > 0 and redis.call('ZCARD', key) <= known then
    for _, node in ipairs(late) do
      if usable(node) then return node end
    end
  end
  return nil
end

local function give(gateway, id, model, kind, node, reads)
  local place = place_of(model, node)
  local used = redis.call('HINCRBY', P .. 'used:' .. model, node, 1)
  arrange(model, node, place, used)
  redis.call('HINCRBY', P .. 'busy:' .. node, 'requests', 1)
  if EMBED[kind] then redis.call('HINCRBY', P .. 'busy:' .. node, 'embeds', 1) end
  if LONG[kind] and reads then redis.call('HINCRBY', P .. 'busy:' .. node, 'long', 1) end
  local generation = place and place.generation or 0
  local text = table.concat({ 'g', model, kind, node, generation, LONG[kind] and reads and 1 or 0 }, ' ')
  redis.call('HSET', P .. 'held:' .. gateway, id, text)
  return generation
end

-- The nodes that a request avoids, in the words for them.
local function marks(preferred)
  local found = {}
  for _, word in ipairs(preferred) do
    local mark = string.byte(word)
    if mark == 33 or mark == 126 then found[#found + 1] = word end
  end
  return table.concat(found, ' ')
end

-- Give what is free of a model to those who wait, in their order, of those that avoid nodes the first of each avoided
-- set; `node` is where something has become free. Who does not listen, since the gateway is dead or connects anew, stands
-- where one stands that comes in half a second, also if it stood at the head: it holds up nobody.
local function serve(model, node)
  local deaf, moved, queues = {}, 0, {}
  for kind = 0, LAST_KIND do queues[kind + 1] = P .. 'wait:' .. model .. ':' .. kind end
  for _ = 1, TURNS do
    -- Where nothing is free nobody is looked at: on a busy node all its models come by here with each slot.
    local least = redis.call('ZRANGE', P .. 'load:' .. model, 0, 0, 'WITHSCORES')[2]
    if not least or tonumber(least) >= FULL then
      if redis.call('EXISTS', unpack(queues)) == 0 then redis.call('SREM', P .. 'queued', model) end
      return
    end
    local heads, waits, before = {}, false, moved
    for kind = 0, LAST_KIND do
      local queue, most = queues[kind + 1], kind < PICKY and not next(deaf) and 0 or SCAN - 1
      local first = redis.call('ZRANGE', queue, 0, most, 'WITHSCORES')
      local known = {}
      for at = 1, #first, 2 do
        waits = true
        local score, gateway, id = tonumber(first[at + 1]), string.match(first[at], '(%S+) (%S+)')
        if deaf[gateway] then
          if score < now + LATER then
            redis.call('ZADD', queue, string.format('%.0f', now + LATER + moved), first[at])
            moved = moved + 1
          end
        elseif kind >= PICKY or #heads == 0 or heads[#heads][3] ~= tostring(kind) then
          local ticket = redis.call('HGET', P .. 'held:' .. gateway, id)
          local preferred = { unpack(ticket and words(ticket) or {}, 5) }
          local avoided = kind < PICKY and '' or marks(preferred)
          if not known[avoided] then
            known[avoided] = true
            heads[#heads + 1] = { first[at], score, tostring(kind), gateway, id, preferred }
          end
        end
      end
    end
    if #heads == 0 and moved == before then
      if not waits then redis.call('SREM', P .. 'queued', model) end
      return
    end
    table.sort(heads, function(a, b) return a[2] < b[2] or (a[2] == b[2] and a[1] < b[1]) end)
    local given = moved > before
    for _, head in ipairs(heads) do
      local gateway, id, nodes = head[4], head[5], head[6]
      if node then nodes[#nodes + 1] = node end
      local found = find(model, head[3], nodes)
      local queue, channel = P .. 'wait:' .. model .. ':' .. head[3], P .. 'wake:' .. gateway
      if found and redis.call('PUBSUB', 'NUMSUB', channel)[2] == 0 then
        deaf[gateway] = true
        given = true
        break
      elseif found then
        redis.call('ZREM', queue, head[1])
        local generation = give(gateway, id, model, head[3], found, true)
        redis.call('PUBLISH', channel, id .. ' ' .. found .. ' ' .. generation)
        given = true
        break
      end
    end
    if not given then return end
  end
end

-- The same for every model on a node that somebody waits for: what runs for one bounds what may run for another.
local function serve_node(node, first)
  if first and redis.call('SISMEMBER', P .. 'queued', first) == 1 then serve(first, node) end
  for _, model in ipairs(redis.call('SINTER', P .. 'queued', P .. 'models:' .. node)) do
    if model ~= first then serve(model, node) end
  end
end

-- Where a request has a slot, and whether its prompt is still read: "node 1|0"; "" where it waits.
local function runs_of(text)
  local node, reads = string.match(text, '^g %S+ %S+ (%S+) %S+ (%S+)$')
  return node and node .. ' ' .. reads or ''
end

-- Take back what a request of a gateway holds, a slot or a ticket. Returns its node and model, if that is a slot.
local function take_back(gateway, id)
  local text = redis.call('HGET', P .. 'held:' .. gateway, id)
  if not text then return nil end
  redis.call('HDEL', P .. 'held:' .. gateway, id)
  local what, model, kind, node, _, reads = unpack(words(text))
  if what == 't' then
    redis.call('ZREM', P .. 'wait:' .. model .. ':' .. kind, gateway .. ' ' .. id)
    return nil
  end
  local place = place_of(model, node)
  local used = redis.call('HINCRBY', P .. 'used:' .. model, node, -1)
  arrange(model, node, place, used)
  redis.call('HINCRBY', P .. 'busy:' .. node, 'requests', -1)
  if EMBED[kind] then redis.call('HINCRBY', P .. 'busy:' .. node, 'embeds', -1) end
  if reads == '1' then redis.call('HINCRBY', P .. 'busy:' .. node, 'long', -1) end
  return node, model
end

-- Take over the state of a model on a node.
local function stand(node, model, state, generation, slots, step)
  local old = place_of(model, node)
  local before = old and old.state == 'resident' and old.slots or 0
  local after = state == 'resident' and slots or 0
  redis.call('HSET', P .. 'places:' .. model, node,
    string.format('%s %.0f %d %.0f', state, generation, slots, step))
  redis.call('INCRBY', P .. 'total:' .. model, after - before)
  redis.call('SADD', P .. 'models:' .. node, model)
  local used = tonumber(redis.call('HGET', P .. 'used:' .. model, node) or 0)
  arrange(model, node, place_of(model, node), used)
  local most = 0
  for _, other in ipairs(redis.call('SMEMBERS', P .. 'models:' .. node)) do
    local place = place_of(other, node)
    if place and place.state == 'resident' then most = math.max(most, place.slots) end
  end
  redis.call('HSET', P .. 'busy:' .. node, 'slots', most)
end

-- A slot for a request, or again for one that waits: {1, node, generation}; or a
-- ticket: {2, position, slots, start time, us of a load where it has no slots}; or {3, tickets} where too many wait.
local function ask(gateway, id, model, kind, key, cost, weight, batch, most, preferred)
  local text = redis.call('HGET', P .. 'held:' .. gateway, id)
  local held = text and words(text)
  if held and held[1] == 'g' then return { 1, held[4], tonumber(held[5]) } end
  local queue = P .. 'wait:' .. model .. ':' .. kind
  local member = gateway .. ' ' .. id
  local picky = tonumber(kind) >= PICKY
  if held and (picky or redis.call('ZRANK', queue, member) == 0) then
    -- It could not be told of its turn.
    local node = find(model, kind, preferred)
    if node then
      redis.call('ZREM', queue, member)
      return { 1, node, give(gateway, id, model, kind, node, true) }
    end
    -- What it avoids changes while it waits.
    redis.call('HSET', P .. 'held:' .. gateway, id, table.concat({ 't', model, kind, held[4], unpack(preferred) }, ' '))
  end
  local slots = tonumber(redis.call('GET', P .. 'total:' .. model) or 0)
  if not held then
    redis.call('HINCRBY', P .. 'asked', model, 1)
    redis.call('ZADD', P .. 'live', 'NX', now + LEASE, gateway)
    -- One of its kind that waits may use no slot, else it had one: nor may this, unless they avoid other nodes.
    if picky or redis.call('EXISTS', queue) == 0 then
      local node = find(model, kind, preferred)
      if node then return { 1, node, give(gateway, id, model, kind, node, true) } end
    end
    local waiting = 0
    for other = 0, LAST_KIND do waiting = waiting + redis.call('ZCARD', P .. 'wait:' .. model .. ':' .. other) end
    local since
    for _, word in ipairs(preferred) do since = since or string.match(word, '^%^(%d*)$') end
    if waiting >= most and not since then return { 3, waiting } end
    local finish = P .. 'finish:' .. model
    local start = math.max(now, tonumber(redis.call('ZSCORE', finish, key) or 0))
    start = math.min(start, now + AHEAD_MAX)
    redis.call('ZREMRANGEBYSCORE', finish, '-inf', now)
    redis.call('ZADD', finish, math.floor(start + cost / (math.max(weight, 0.01) * math.max(1, slots))), key)
    if since == '' then
      start = now - AEON
    else
      if since then start = now - tonumber(since) end
      if batch then start = start + BATCH_LATER end
    end
    local score = string.format('%.0f', start)
    redis.call('ZADD', queue, score, member)
    redis.call('SADD', P .. 'queued', model)
    redis.call('HSET', P .. 'held:' .. gateway, id,
      table.concat({ 't', model, kind, score, unpack(preferred) }, ' '))
  end
  local score = redis.call('ZSCORE', queue, member)
  local ahead = redis.call('ZRANK', queue, member) or 0
  for other = 0, LAST_KIND do
    if tostring(other) ~= kind and score then
      ahead = ahead + redis.call('ZCOUNT', P .. 'wait:' .. model .. ':' .. other, '-inf', '(' .. score)
    end
  end
  if slots > 0 then return { 2, ahead + 1, slots, score } end
  return { 2, ahead + 1, slots, score, tonumber(redis.call('HGET', P .. 'loads', model) or 0) }
end
