-- Receiving: what is due, the claim, those who wait.

-- Make ready what is due: delayed messages, and those whose lease ran out; expire what outlived its time to live. Whatever
-- somebody else has locked is left to him.
CREATE OR REPLACE FUNCTION filao.make_due(q integer, now bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  m     filao.message;
  moved bigint;
BEGIN
  IF EXISTS (SELECT FROM filao.message WHERE queue = q AND state = 'delayed' AND at <= now) THEN
    WITH due AS MATERIALIZED (
      SELECT id FROM filao.message
      WHERE queue = q AND state = 'delayed' AND at <= now AND grp IS NULL
      ORDER BY at LIMIT 5000 FOR UPDATE SKIP LOCKED
    )
    UPDATE filao.message AS t SET state = 'ready', at = now, token = 0 FROM due WHERE t.id = due.id;
    GET DIAGNOSTICS moved = ROW_COUNT;
    PERFORM filao.count(q, ARRAY['delayed', 'ready'], ARRAY[-moved, moved]) WHERE moved > 0;
    FOR m IN
      SELECT * FROM filao.message
      WHERE queue = q AND state = 'delayed' AND at <= now AND grp IS NOT NULL
      ORDER BY at LIMIT 1000 FOR UPDATE SKIP LOCKED
    LOOP
      CONTINUE WHEN NOT pg_try_advisory_xact_lock(filao.group_key(q, m.grp));
      SELECT * INTO m FROM filao.message WHERE id = m.id;  -- another of its group may have moved it in this loop
      IF m.state = 'delayed' THEN
        PERFORM filao.give_back(m, NULL, 0, now, false);
      END IF;
    END LOOP;
  END IF;
  FOR m IN
    SELECT * FROM filao.message
    WHERE queue = q AND state = 'leased' AND at <= now
    ORDER BY at LIMIT 1000 FOR UPDATE SKIP LOCKED
  LOOP
    IF m.grp IS NULL OR pg_try_advisory_xact_lock(filao.group_key(q, m.grp)) THEN
      PERFORM filao.lose(m, 'lease_expired', now);
    END IF;
  END LOOP;
  PERFORM filao.expire_some(q, 1000, now, false);
  IF EXISTS (SELECT FROM filao.unarranged WHERE queue = q) THEN
    PERFORM filao.arrange_noted(q, now);
  END IF;
END
$$;

-- Lease messages. `waiting` is how many callers are about to wait: when there are fewer messages, their process goes on the
-- waiting list, and a last row without an id says when something is due, in milliseconds: at once for a process that was
-- not on the list when it looked, for what was sent meanwhile called nobody.
CREATE OR REPLACE FUNCTION filao.receive(
  q integer, moment bigint, process integer, lease bigint, token bigint, most integer, waiting integer
) RETURNS TABLE (
  id bigint, priority integer, attempts integer, grp text, dedup_key text, message_id text, headers text, kind smallint,
  content bytea, sent_at bigint, failures integer, crashed boolean, salt bigint, due_in bigint
)
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
  now   bigint := coalesce(moment, filao.clock());
  rules filao.queue;
  found bigint := 0;
BEGIN
  SELECT * INTO STRICT rules FROM filao.queue WHERE id = q;
  IF NOT rules.paused THEN
    PERFORM filao.make_due(q, now);
    RETURN QUERY
      WITH picked AS MATERIALIZED (
        SELECT m.id, m.grp FROM filao.message m
        WHERE m.queue = q AND m.state = 'ready'
        ORDER BY m.priority DESC, m.id LIMIT most FOR UPDATE SKIP LOCKED
      ), mine AS MATERIALIZED (
        SELECT picked.id FROM picked
        WHERE picked.grp IS NULL OR pg_try_advisory_xact_lock(filao.group_key(q, picked.grp))
      ), leased AS (
        UPDATE filao.message AS m
        SET state = 'leased', at = now + coalesce(lease, rules.lease), token = receive.token, attempts = m.attempts + 1
        FROM mine WHERE m.id = mine.id
        RETURNING m.*
      )
      SELECT l.id, l.priority, l.attempts, l.grp, l.dedup_key, l.message_id, l.headers, l.kind, l.content, l.sent_at,
             l.failures,
             l.failures > 0 AND 'crashed' = (
               SELECT f.outcome FROM filao.failure f WHERE f.message = l.id ORDER BY f.id DESC LIMIT 1
             ),
             l.salt, NULL::bigint
      FROM leased l
      ORDER BY l.priority DESC, l.id;
    GET DIAGNOSTICS found = ROW_COUNT;
    PERFORM filao.count(q, ARRAY['ready', 'leased', 'received'], ARRAY[-found, found, found]) WHERE found > 0;
  END IF;
  IF found < greatest(waiting, 1) THEN
    id := NULL; content := NULL;
    due_in := filao.due_in(q, now);
    IF waiting > 0 AND filao.wait(q, process, waiting - found::integer) THEN
      due_in := 0;
    END IF;
    RETURN NEXT;
  END IF;
END
$$;

-- Milliseconds until the next delayed message or running lease is due; NULL when there is none. (GREATEST passes NULL over.)
CREATE OR REPLACE FUNCTION filao.due_in(q integer, now bigint) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT CASE WHEN due.at IS NOT NULL THEN greatest(0, due.at - now) END
  FROM (SELECT least(
    (SELECT at FROM filao.message WHERE queue = q AND state = 'delayed' ORDER BY at LIMIT 1),
    (SELECT at FROM filao.message WHERE queue = q AND state = 'leased' ORDER BY at LIMIT 1)
  )) AS due (at)
$$;

-- Put a process on the waiting list; false when it stood there. It writes nothing then, so that polling costs no flush.
CREATE OR REPLACE FUNCTION filao.wait(q integer, p integer, wanted integer) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO filao.waiting (queue, process, wants) VALUES (q, p, wanted) ON CONFLICT DO NOTHING;
  RETURN FOUND;
END
$$;

-- Call those who have waited longest: enough of them for so many messages, each on a channel of its own, so that nobody
-- wakes up in vain. Not in the transaction that sent: a NOTIFY is a lock that all commits wait for.
CREATE OR REPLACE FUNCTION filao.call(queues integer[], amounts integer[]) RETURNS void
LANGUAGE sql SET enable_seqscan = off SET jit = off AS $$
  WITH listed AS (
    SELECT w.queue, w.process, given.amount, sum(w.wants) OVER (PARTITION BY w.queue ORDER BY w.since) - w.wants AS before
    FROM unnest(queues, amounts) AS given (queue, amount)
    CROSS JOIN LATERAL (
      SELECT * FROM filao.waiting w WHERE w.queue = given.queue ORDER BY w.since LIMIT 100
    ) AS w
  ), chosen AS ( -- whoever is being called by another is called by him
    SELECT w.queue, w.process FROM filao.waiting w JOIN listed USING (queue, process)
    WHERE listed.before < listed.amount FOR UPDATE OF w SKIP LOCKED
  ), called AS (
    DELETE FROM filao.waiting w USING chosen WHERE w.queue = chosen.queue AND w.process = chosen.process
    RETURNING w.queue, w.process
  )
  SELECT pg_notify('filao_' || process, queue::text) FROM called
$$;
