"""The queue's atomic steps, as Redis runs them (6.2 or newer, Valkey).

An entry of the job stream is small; its pixels lie in a key of their own, which Redis removes at the deadline.
`load` counts the images and bytes that wait or are in work: exactly those of the stream's entries and of the
reservations in `uploads`. Should it be missing (Redis lost its data, or it expired unused), it is counted anew.
`events` counts what `survey.Events` names. A reply key followed by `ALIVE` exists while the API that reads it lives.
"""

ALIVE = ":alive"
EVENTS_TTL_MS = 7 * 24 * 3_600_000

_PRELUDE = (
    """
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
local function table_of(flat)
  local fields = {}
  for k = 1, #flat, 2 do fields[flat[k]] = flat[k + 1] end
  return fields
end
local function recount(jobs, uploads, load, ttl_ms)
  local images, bytes = 0, 0
  redis.call('ZREMRANGEBYSCORE', uploads, '-inf', now_ms())
  for _, member in ipairs(redis.call('ZRANGE', uploads, 0, -1)) do
    local i, b = string.match(member, ':(%d+):(%d+)$')
    images, bytes = images + i, bytes + b
  end
  for _, entry in ipairs(redis.call('XRANGE', jobs, '-', '+')) do
    local fields = table_of(entry[2])
    images, bytes = images + fields.images, bytes + fields.bytes
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
local function count(events, name, by)
  if by == 0 then return end
  redis.call('HINCRBY', events, name, by)
  redis.call('PEXPIRE', events, """
    + str(EVENTS_TTL_MS)
    + """)
end
"""
)

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
-- KEYS jobs uploads load events; ARGV member images bytes deadline_in_ms reply_key alive_ms request again
-- payload_prefix, then uid images bytes for each job. Turns a reservation into entries, and has the payloads live as
-- long as they; returns their ids. `again` is 1 where the entries take the place of lost ones.
if redis.call('ZREM', KEYS[2], ARGV[1]) == 0 and redis.call('EXISTS', KEYS[3]) == 1 then
  redis.call('HINCRBY', KEYS[3], 'images', ARGV[2])
  redis.call('HINCRBY', KEYS[3], 'bytes', ARGV[3])
end
redis.call('SET', ARGV[5] .. '"""
    + ALIVE
    + """', '1', 'PX', ARGV[6])
local now = now_ms()
local ids = {}
for k = 10, #ARGV, 3 do
  redis.call('PEXPIRE', ARGV[9] .. ARGV[k], ARGV[4])
  ids[#ids + 1] = redis.call('XADD', KEYS[1], '*', 'uid', ARGV[k], 'images', ARGV[k + 1], 'bytes', ARGV[k + 2],
    'reply', ARGV[5], 'request', ARGV[7],
    'submitted', string.format('%.0f', now), 'deadline', string.format('%.0f', now + ARGV[4]))
end
if ARGV[8] == '1' then count(KEYS[4], 'resubmissions', #ids) end
return ids
"""
)

_ANSWER_EACH = """
local answers = {}
local k = HEAD + 1
while k <= #ARGV do
  local count = tonumber(ARGV[k])
  answers[#answers + 1] = answer(k + 1, k + count)
  k = k + count + 1
end
return answers
"""
"""The end of a script that answers several calls of `calls.Calls`: each is its number of arguments, then these. The
script says how many arguments come before them (`HEAD`), and what answers one of `ARGV[first]` to `ARGV[last]`."""

SUBMIT = (
    _PRELUDE
    + """
-- KEYS jobs uploads load; ARGV limit_images limit_bytes ttl_ms reply_key alive_ms, then calls of images bytes
-- deadline_in_ms request, then uid images bytes shared for each job. ADMIT and ENQUEUE in one step, for payloads that
-- lie in shared memory. Answers {1, id…} if admitted, else {0, images, bytes that are there}. The first write is one
-- that a full Redis refuses.
local HEAD = 5
redis.call('SET', ARGV[4] .. '"""
    + ALIVE
    + """', '1', 'PX', ARGV[5])
if redis.call('EXISTS', KEYS[3]) == 0 then recount(KEYS[1], KEYS[2], KEYS[3], ARGV[3]) end
local images = tonumber(redis.call('HGET', KEYS[3], 'images'))
local bytes = tonumber(redis.call('HGET', KEYS[3], 'bytes'))
local now = now_ms()
local function answer(first, last)
  if images + ARGV[first] > tonumber(ARGV[1]) or bytes + ARGV[first + 1] > tonumber(ARGV[2]) then
    return {0, images, bytes}
  end
  images, bytes = images + ARGV[first], bytes + ARGV[first + 1]
  redis.call('HINCRBY', KEYS[3], 'images', ARGV[first])
  redis.call('HINCRBY', KEYS[3], 'bytes', ARGV[first + 1])
  local ids = {1}
  for k = first + 4, last, 4 do
    ids[#ids + 1] = redis.call('XADD', KEYS[1], '*', 'uid', ARGV[k], 'images', ARGV[k + 1], 'bytes', ARGV[k + 2],
      'reply', ARGV[4], 'request', ARGV[first + 3], 'shared', ARGV[k + 3],
      'submitted', string.format('%.0f', now), 'deadline', string.format('%.0f', now + ARGV[first + 2]))
  end
  return ids
end
redis.call('PEXPIRE', KEYS[3], ARGV[3])
"""
    + _ANSWER_EACH
)

FINISH = (
    _PRELUDE
    + """
-- KEYS jobs load dead events; ARGV group payload_prefix reply_ttl_ms dead_ttl_ms, then calls of id images bytes uid
-- reply_key body, then the fields of the dead letter (none: no dead letter).
-- Replies to a job and deletes it only if this call acknowledged its entry; answers 1 if so. The first write comes
-- before those that need memory, so that a full Redis can still be emptied.
local HEAD = 4
local function answer(first, last)
  if redis.call('XACK', KEYS[1], ARGV[1], ARGV[first]) == 0 then return 0 end
  if redis.call('XDEL', KEYS[1], ARGV[first]) == 1 then release(KEYS[2], ARGV[first + 1], ARGV[first + 2]) end
  redis.call('UNLINK', ARGV[2] .. ARGV[first + 3])
  if last > first + 5 then
    redis.call('XADD', KEYS[3], 'MAXLEN', '~', 1000, '*', unpack(ARGV, first + 6, last))
    redis.call('PEXPIRE', KEYS[3], ARGV[4])
    count(KEYS[4], 'dead_letters', 1)
  end
  redis.call('XADD', ARGV[first + 4], '*', 'uid', ARGV[first + 3], 'body', ARGV[first + 5])
  redis.call('PEXPIRE', ARGV[first + 4], ARGV[3])
  return 1
end
"""
    + _ANSWER_EACH
)

DROP = (
    _PRELUDE
    + """
-- KEYS jobs load payload events; ARGV group id images bytes: drops a job that nobody waits for.
redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
if redis.call('XDEL', KEYS[1], ARGV[2]) == 1 then
  release(KEYS[2], ARGV[3], ARGV[4])
  count(KEYS[4], 'dropped', 1)
end
redis.call('UNLINK', KEYS[3])
"""
)

OWN = (
    _PRELUDE
    + """
-- KEYS jobs; ARGV reply_key: the jobs of one API, as {id, uid, images, bytes} each.
local own = {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
  local fields = table_of(entry[2])
  if fields.reply == ARGV[1] then own[#own + 1] = {entry[1], fields.uid, fields.images, fields.bytes} end
end
return own
"""
)

RENEW = (
    _PRELUDE
    + """
-- KEYS jobs events; ARGV group consumer id…: renews the lease of those that are still ours; returns how many.
local renewed = 0
for k = 3, #ARGV do
  local mine = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[k], ARGV[k], 1, ARGV[2])
  if #mine == 1 then
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[k], 'JUSTID')
    renewed = renewed + 1
  end
end
count(KEYS[2], 'renewals', renewed)
return renewed
"""
)

TAKE_OVER = (
    _PRELUDE
    + """
-- KEYS jobs events; ARGV group consumer lease_ms: claims one entry whose lease ran out.
-- Returns {id, deliveries, fields} of it, or nothing. One alone, for each delivery counts against a job: those that
-- wait behind one that kills its worker must not be counted with it. XAUTOCLAIM would not tell the deliveries, and
-- its answer for a deleted entry differs between Redis 6.2 and 7.
for _, pending in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[3], '-', '+', 100)) do
  local claimed = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], pending[1])
  if claimed[1] then
    if pending[4] > 0 then count(KEYS[2], 'redeliveries', 1) end
    return {pending[1], pending[4] + 1, claimed[1][2]}
  end
  redis.call('XACK', KEYS[1], ARGV[1], pending[1])
end
return false
"""
)

HANDED_BACK = "handed-back"
"""The consumer that holds what leaving workers gave back."""

HAND_BACK = """
-- KEYS jobs; ARGV group consumer lease_ms handed_back: a leaving consumer's entries may be taken over at once, and
-- this delivery does not count against them.
while true do
  local mine = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 100, ARGV[2])
  if #mine == 0 then break end
  for _, pending in ipairs(mine) do
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[4], 0, pending[1], 'IDLE', ARGV[3],
      'RETRYCOUNT', math.max(0, pending[4] - 1), 'JUSTID')
    local still = redis.call('XPENDING', KEYS[1], ARGV[1], pending[1], pending[1], 1, ARGV[2])
    if #still == 1 then redis.call('XACK', KEYS[1], ARGV[1], pending[1]) end
  end
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
"""

TIDY = (
    _PRELUDE
    + """
-- KEYS jobs uploads load events; ARGV group ttl_ms overdue_ms payload_prefix forget_ms stream_ttl_ms: drops the jobs
-- that nobody waits for, because their API is dead or their deadline is long past, strikes off workers that are long
-- gone, and counts the load anew.
local now, dropped = now_ms(), 0
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
  local fields = table_of(entry[2])
  local alive = redis.call('EXISTS', fields.reply .. '"""
    + ALIVE
    + """') == 1
  if not alive or fields.deadline + ARGV[3] < now then
    redis.pcall('XACK', KEYS[1], ARGV[1], entry[1])
    redis.call('XDEL', KEYS[1], entry[1])
    redis.call('UNLINK', ARGV[4] .. fields.uid)
    dropped = dropped + 1
  end
end
count(KEYS[4], 'dropped', dropped)
local consumers = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if not consumers.err then
  for _, consumer in ipairs(consumers) do
    local fields = table_of(consumer)
    if fields.pending == 0 and fields.idle > tonumber(ARGV[5]) then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], fields.name)
    end
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[6])
recount(KEYS[1], KEYS[2], KEYS[3], ARGV[2])
"""
)

SURVEY = (
    _PRELUDE
    + """
-- KEYS jobs load dead events; ARGV group handed_back.
-- Returns {images waiting, images leased, bytes, age of the oldest job in ms, dead letters, events}.
local leased = {}
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000000)
if not pending.err then
  for _, entry in ipairs(pending) do leased[entry[1]] = entry[2] ~= ARGV[2] end
end
local waiting_images, leased_images, oldest = 0, 0, nil
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], '-', '+')) do
  local fields = table_of(entry[2])
  if leased[entry[1]] then leased_images = leased_images + fields.images
  else waiting_images = waiting_images + fields.images end
  oldest = math.min(oldest or fields.submitted, fields.submitted)
end
return {waiting_images, leased_images, tonumber(redis.call('HGET', KEYS[2], 'bytes') or '0'),
  oldest and math.max(0, now_ms() - oldest) or 0, redis.call('XLEN', KEYS[3]), redis.call('HGETALL', KEYS[4])}
"""
)

CLAIM_ANSWER = """
-- KEYS answer; ARGV owner digest lease_ms
-- Returns {'mine'} if the caller shall find the answer, {'wait'} if another does, {'done', answer}, or {'other'} if
-- the key belongs to another request.
local digest = redis.call('HGET', KEYS[1], 'digest')
if not digest then
  redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'digest', ARGV[2])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
  return {'mine'}
end
if digest ~= ARGV[2] then return {'other'} end
local answer = redis.call('HGET', KEYS[1], 'answer')
if answer then return {'done', answer} end
return {'wait'}
"""

HOLD_ANSWER = """
-- KEYS answer; ARGV owner lease_ms: says that its owner is still at it; an answer that is there is kept for longer.
if redis.call('HGET', KEYS[1], 'owner') == ARGV[1] and redis.call('HEXISTS', KEYS[1], 'answer') == 0 then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
"""

STORE_ANSWER = """
-- KEYS answer; ARGV owner digest answer ttl_ms: keeps an answer, unless another has become the owner.
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner and owner ~= ARGV[1] then return end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'digest', ARGV[2], 'answer', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[4])
"""

RELEASE_ANSWER = """
-- KEYS answer; ARGV owner: there will be no answer; whoever repeats the request may find one.
if redis.call('HGET', KEYS[1], 'owner') == ARGV[1] and redis.call('HEXISTS', KEYS[1], 'answer') == 0 then
  redis.call('DEL', KEYS[1])
end
"""
