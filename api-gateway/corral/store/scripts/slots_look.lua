-- Whether there is a leader (1 or 0), and of how many gateways the lease has run out.
return { redis.call('EXISTS', P .. 'leader'), redis.call('ZCOUNT', P .. 'live', '-inf', now) }
