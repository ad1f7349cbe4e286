"""The queue's atomic steps, as Redis runs them (6.2 or newer, Valkey).

An entry of the job stream is small; its pixels lie in a key of their own, which Redis removes at the deadline.
`load` counts the images and bytes that wait or are in work: exactly those of the stream's entries and of the
reservations in `uploads`. Should it be missing (Redis lost its data, or it expired unused), it is counted anew.
"""

_PRELUDE = """
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
local function recount(jobs, uploads, load, ttl_ms)
  local images, bytes = 0, 0
  redis.call('ZREMRANGEBYSCORE', uploads, '-inf', now_ms())
  for _, member in ipairs(redis.call('ZRANGE', uploads, 0, -1)) do
    local i, b = string.match(member, ':(%d+):(%d+)$')
    images, bytes = images + i, bytes + b
  end
  for _, entry in ipairs(redis.call('XRANGE', jobs, '-', '+')) do
    local fields = entry[2]
    for k = 1, #fields, 2 do
      if fields[k] == 'images' then images = images + fields[k + 1] end
      if fields[k] == 'bytes' then bytes = bytes + fields[k + 1] end
    end
  end
  redis.call('HSET', load, 'images', string.format('%.0f', images), 'bytes', string.format('%.0f', bytes))
  redis.call('PEXPIRE', load, ttl_ms)
end
local function release(load, images, bytes)
  if redis.call('EXISTS', load) == 1 then
    redis.call('HINCRBY', load, 'images', -images)
    redis.call('HINCRBY', load, 'bytes', -bytes)
  end
end
"""

ADMIT = (
    _PRELUDE
    + """
-- KEYS jobs uploads load; ARGV member images bytes limit_images limit_bytes upload_ttl_ms ttl_ms
-- Returns {1 if admitted, images, bytes that were there before}.
if redis.call('EXISTS', KEYS[3]) == 0 then recount(KEYS[1], KEYS[2], KEYS[3], ARGV[7]) end
local images = tonumber(redis.call('HGET', KEYS[3], 'images'))
local bytes = tonumber(redis.call('HGET', KEYS[3], 'bytes'))
if images + ARGV[2] > tonumber(ARGV[4]) or bytes + ARGV[3] > tonumber(ARGV[5]) then return {0, images, bytes} end
redis.call('HINCRBY', KEYS[3], 'images', ARGV[2])
redis.call('HINCRBY', KEYS[3], 'bytes', ARGV[3])
redis.call('PEXPIRE', KEYS[3], ARGV[7])
redis.call('ZADD', KEYS[2], now_ms() + ARGV[6], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[7])
return {1, images, bytes}
"""
)

WITHDRAW = (
    _PRELUDE
    + """
-- KEYS uploads load; ARGV member images bytes: gives a reservation back.
if redis.call('ZREM', KEYS[1], ARGV[1]) == 1 then release(KEYS[2], ARGV[2], ARGV[3]) end
"""
)

ENQUEUE = (
    _PRELUDE
    + """
-- KEYS jobs uploads load; ARGV member images bytes deadline_in_ms reply_key, then uid images bytes for each job
-- Turns a reservation into entries; returns their ids.
if redis.call('ZREM', KEYS[2], ARGV[1]) == 0 and redis.call('EXISTS', KEYS[3]) == 1 then
  redis.call('HINCRBY', KEYS[3], 'images', ARGV[2])
  redis.call('HINCRBY', KEYS[3], 'bytes', ARGV[3])
end
local now = now_ms()
local ids = {}
for k = 6, #ARGV, 3 do
  ids[#ids + 1] = redis.call('XADD', KEYS[1], '*', 'uid', ARGV[k], 'images', ARGV[k + 1], 'bytes', ARGV[k + 2],
    'reply', ARGV[5], 'submitted', string.format('%.0f', now), 'deadline', string.format('%.0f', now + ARGV[4]))
end
return ids
"""
)

FINISH = (
    _PRELUDE
    + """
-- KEYS jobs load payload reply dead; ARGV group id images bytes reply_ttl_ms dead_ttl_ms count_of_dead_fields,
-- then the fields of the dead letter (none: no dead letter), then those of the reply.
-- Replies and deletes only if this call acknowledged the entry; returns 1 if so. The first write comes before those
-- that need memory, so that a full Redis can still be emptied.
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
if redis.call('XDEL', KEYS[1], ARGV[2]) == 1 then release(KEYS[2], ARGV[3], ARGV[4]) end
redis.call('UNLINK', KEYS[3])
local dead = tonumber(ARGV[7])
if dead > 0 then
  redis.call('XADD', KEYS[5], 'MAXLEN', '~', 1000, '*', unpack(ARGV, 8, 7 + dead))
  redis.call('PEXPIRE', KEYS[5], ARGV[6])
end
redis.call('XADD', KEYS[4], '*', unpack(ARGV, 8 + dead))
redis.call('PEXPIRE', KEYS[4], ARGV[5])
return 1
"""
)

CANCEL = (
    _PRELUDE
    + """
-- KEYS jobs load payload; ARGV group id images bytes: drops a job that nobody waits for.
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
if redis.call('XDEL', KEYS[1], ARGV[2]) == 1 then release(KEYS[2], ARGV[3], ARGV[4]) end
redis.call('UNLINK', KEYS[3])
"""
)

RENEW = """
-- KEYS jobs; ARGV group consumer id…: renews the lease of those that are still ours; returns how many.
local renewed = 0
for k = 3, #ARGV do
  local mine = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[k], ARGV[k], 1, ARGV[2])
  if #mine == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[k], 'JUSTID')
    renewed = renewed + 1
  end
end
return renewed
"""

TAKE_OVER = """
-- KEYS jobs; ARGV group consumer lease_ms count: claims entries whose lease ran out.
-- Returns {id, deliveries, fields} of each. XAUTOCLAIM would not tell the deliveries, and its answer for a deleted
-- entry differs between Redis 6.2 and 7.
local taken = {}
for _, pending in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], '-', '+', ARGV[4])) do
  local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], pending[1])
  if claimed[1] then
    taken[#taken + 1] = {pending[1], pending[4] + 1, claimed[1][2]}
  else
    redis.call('XACK', KEYS[1], ARGV[1], pending[1])
  end
end
return taken
"""

HAND_BACK = """
-- KEYS jobs; ARGV group consumer lease_ms: a leaving consumer's entries may be taken over at once, and this delivery
-- does not count against them.
while true do
  local mine = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 100, ARGV[2])
  if #mine == 0 then break end
  for _, pending in ipairs(mine) do
    redis.call('XCLAIM', KEYS[1], ARGV[1], 'handed-back', 0, pending[1], 'IDLE', ARGV[3],
      'RETRYCOUNT', math.max(0, pending[4] - 1), 'JUSTID')
    local still = redis.call('XPENDING', KEYS[1], ARGV[1], pending[1], pending[1], 1, ARGV[2])
    if #still == 1 then redis.call('XACK', KEYS[1], ARGV[1], pending[1]) end
  end
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
"""

RECONCILE = (
    _PRELUDE
    + """
-- KEYS jobs uploads load; ARGV ttl_ms: counts the load anew.
recount(KEYS[1], KEYS[2], KEYS[3], ARGV[1])
"""
)
