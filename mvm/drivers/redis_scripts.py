"""The registry's atomic steps, as Lua run inside Redis. Keys begin with ``mvm:``.

==========================  =======================================================================
``mvm:version``             the version of all of these
``mvm:nodes``               hash: node id -> record
``mvm:tenants``             hash: tenant id -> record
``mvm:net_ids``             set of every net id ever given; shrinks only when a tenant could not be made
``mvm:kept``                it has not lost its data since somebody first asked
``mvm:rebuilding``          it has, and this long its nodes still have to put theirs back
``mvm:pools``               hash: pool ref -> node id
``mvm:job:<id>``            a job's record
``mvm:jobs``                sorted set of job ids by submission, milliseconds; sweeps in ``mvm:sweeps``
``mvm:open:<node>``         set of the node's jobs that are queued or running
``mvm:events:<id>``         stream that grows with every change of the job
``mvm:bulk:<id>``           hash of a bulk job: total, done, failed, parallel
``mvm:bulk:<id>:children``  its children in order; ``:held`` those not yet sent
``mvm:cancel:<id>``         somebody asked the job to end
``mvm:refused:<task id>``    the error of a Celery task that never became a job
``mvm:sweep:<verb>:<node>`` the sweep that is queued or running
``mvm:tick:<verb>:<node>``  the period that had a sweep last
==========================  =======================================================================
"""

# ARGV: tenant id, record, net id, number of tenants the choice was made among
RESERVE_TENANT = """
if redis.call('HEXISTS', 'mvm:tenants', ARGV[1]) == 1 then return 'exists' end
if redis.call('SISMEMBER', 'mvm:net_ids', ARGV[3]) == 1 then return 'taken' end
if redis.call('HLEN', 'mvm:tenants') ~= tonumber(ARGV[4]) then return 'moved' end
redis.call('SADD', 'mvm:net_ids', ARGV[3])
redis.call('HSET', 'mvm:tenants', ARGV[1], ARGV[2])
return 'ok'
"""

# ARGV: milliseconds that its nodes have if it has lost its data. Returns those that they still have.
REBUILDING = """
if redis.call('SETNX', 'mvm:kept', 1) == 1 and tonumber(ARGV[1]) > 0 then
  redis.call('SET', 'mvm:rebuilding', 1, 'PX', ARGV[1])
end
return math.max(0, redis.call('PTTL', 'mvm:rebuilding'))
"""

# ARGV: tenant id, record as it was reserved, net id
WITHDRAW_TENANT = """
if redis.call('HGET', 'mvm:tenants', ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', 'mvm:tenants', ARGV[1])
return redis.call('SREM', 'mvm:net_ids', ARGV[3])
"""

# ARGV: tenant id, node that has it no more
REMOVE_TENANT = """
local pools = redis.call('HGETALL', 'mvm:pools')
for at = 1, #pools, 2 do
  if string.sub(pools[at], 1, #ARGV[1] + 1) == ARGV[1] .. '/' and pools[at + 1] ~= ARGV[2] then return 0 end
end
return redis.call('HDEL', 'mvm:tenants', ARGV[1])
"""

# ARGV: pool ref, node that has it no more
UNPLACE_POOL = """
if redis.call('HGET', 'mvm:pools', ARGV[1]) ~= ARGV[2] then return 0 end
return redis.call('HDEL', 'mvm:pools', ARGV[1])
"""

# ARGV: job id, record, state, "1" if final, node, parent or "", now (ISO), seconds to keep a final job, "1" if only a
# job that is still queued ends so, and whoever takes it later finds that somebody asked it to
# Returns the parent's record when this update ended it, "" when nothing else ended, false when dropped.
UPDATE_JOB = """
local key = 'mvm:job:' .. ARGV[1]
local known = redis.call('GET', key)
local function final(state) return state == 'succeeded' or state == 'failed' or state == 'cancelled' end
if known and final(cjson.decode(known).state) then return false end
if ARGV[9] == '1' then
  if known and cjson.decode(known).state ~= 'queued' then return false end
  redis.call('SET', 'mvm:cancel:' .. ARGV[1], 1, 'EX', ARGV[8])
end
local function announce(id)
  redis.call('XADD', 'mvm:events:' .. id, 'MAXLEN', '~', 32, '*', 'c', '1')
  redis.call('EXPIRE', 'mvm:events:' .. id, ARGV[8])
end
redis.call('SET', key, ARGV[2])
if ARGV[4] ~= '1' then
  if not known then redis.call('SADD', 'mvm:open:' .. ARGV[5], ARGV[1]) end
  announce(ARGV[1])
  return ''
end
redis.call('EXPIRE', key, ARGV[8])
redis.call('SREM', 'mvm:open:' .. ARGV[5], ARGV[1])
announce(ARGV[1])
if ARGV[6] == '' then return '' end
local bulk = 'mvm:bulk:' .. ARGV[6]
if redis.call('EXISTS', bulk) == 0 then return '' end
if ARGV[3] == 'cancelled' then redis.call('LREM', bulk .. ':held', 1, ARGV[1]) end
local done = redis.call('HINCRBY', bulk, 'done', 1)
local failed = redis.call('HINCRBY', bulk, 'failed', ARGV[3] == 'succeeded' and 0 or 1)
local total = tonumber(redis.call('HGET', bulk, 'total'))
local raw = redis.call('GET', 'mvm:job:' .. ARGV[6])
if not raw then return '' end
local parent = cjson.decode(raw)
if final(parent.state) then return '' end
parent.progress = {done = done, total = total, failed = failed}
if done < total then
  redis.call('SET', 'mvm:job:' .. ARGV[6], cjson.encode(parent))
  announce(ARGV[6])
  return ''
end
local cancelled = redis.call('EXISTS', 'mvm:cancel:' .. ARGV[6]) == 1
parent.state = failed == 0 and 'succeeded' or cancelled and 'cancelled' or 'failed'
parent.finished_at = ARGV[7]
if failed > 0 and cancelled then
  parent.error = {kind = 'cancelled', code = 'job.cancelled',
    message = failed .. ' of ' .. total .. ' were cancelled or failed',
    hint = 'see: mvm job show ' .. ARGV[6], fields = {failed = failed, total = total}}
elseif failed > 0 then
  parent.error = {kind = 'failed', code = 'bulk.failed', message = failed .. ' of ' .. total .. ' failed',
    hint = 'see: mvm job show ' .. ARGV[6], fields = {failed = failed, total = total}}
end
raw = cjson.encode(parent)
redis.call('SET', 'mvm:job:' .. ARGV[6], raw, 'EX', ARGV[8])
for _, part in ipairs({'', ':children', ':held'}) do redis.call('EXPIRE', bulk .. part, ARGV[8]) end
redis.call('SREM', 'mvm:open:' .. parent.node_id, ARGV[6])
announce(ARGV[6])
return raw
"""

# ARGV: parent id. Returns the ids of held children that may be sent now.
NEXT_CHILDREN = """
local bulk = 'mvm:bulk:' .. ARGV[1]
local total = tonumber(redis.call('HGET', bulk, 'total') or '0')
local done = tonumber(redis.call('HGET', bulk, 'done') or '0')
local parallel = tonumber(redis.call('HGET', bulk, 'parallel') or '0')
local out = {}
while true do
  local held = redis.call('LLEN', bulk .. ':held')
  if held == 0 or total - done - held >= parallel then break end
  out[#out + 1] = redis.call('LPOP', bulk .. ':held')
end
return out
"""

# ARGV: verb and node, job id, tick, milliseconds of a tick, milliseconds that the claim lasts. Returns 1 or 0.
CLAIM_SWEEP = """
local claim, fired = 'mvm:sweep:' .. ARGV[1], 'mvm:tick:' .. ARGV[1]
local holder = redis.call('GET', claim)
if holder == ARGV[2] then return 1 end
local now = redis.call('TIME')
local tick = math.floor((now[1] * 1000 + math.floor(now[2] / 1000)) / ARGV[4])
if holder or tick ~= tonumber(ARGV[3]) or redis.call('GET', fired) == ARGV[3] then return 0 end
redis.call('SET', claim, ARGV[2], 'PX', ARGV[5])
redis.call('SET', fired, ARGV[3])
return 1
"""

# ARGV: key, value. Deletes the key if it still has the value.
RELEASE = """
if redis.call('GET', ARGV[1]) == ARGV[2] then return redis.call('DEL', ARGV[1]) end
return 0
"""
