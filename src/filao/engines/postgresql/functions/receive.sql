-- Receiving: what is due, the claim, those who wait.

-- Make ready what is due: delayed messages, and those whose lease ran out; expire what outlived its time to live.
-- Whatever somebody else has locked is left to them. Returns whether anything may have moved.
--
-- Invariant: a slice of each kind at a time, the earliest first; what is left over is still due, and seen by the next.
CREATE OR REPLACE FUNCTION filao.make_due(q integer, seen filao.seen, now bigint) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  picked bigint[];
  oldest bigint;
  acted  boolean := false;
BEGIN
  IF seen.delayed <= now THEN
    acted := true;
    picked := filao.pick_due(q, seen.delayed, now, 5000);
    PERFORM filao.give_back(q, picked, NULL, false, 0, 0, now, false) WHERE picked IS NOT NULL;
  END IF;
  IF seen.leased <= now THEN
    acted := true;
    SELECT * INTO picked, oldest FROM filao.pick_lapsed(q, seen.leased, now, 1000);
    seen.expiring := least(seen.expiring, oldest);  -- which was not looked at while it was leased
    PERFORM filao.lose(q, picked, 'lease_expired', now) WHERE picked IS NOT NULL;
  END IF;
  IF seen.expiring <= now THEN
    acted := true;
    PERFORM filao.expire_some(q, 1000, now, false, seen.expiring);
  END IF;
  IF seen.noted IS NOT NULL THEN
    acted := true;
    PERFORM filao.arrange_noted(q, now, seen.noted);
  END IF;
  RETURN acted;
END
$$;

-- Lease messages. `waiting` is how many callers are about to wait: when there are fewer messages, their process goes on
-- the waiting list, and a last row without an id says when something is due, in milliseconds: at once for a process
-- that was not on the list when it looked, for what was sent meanwhile called nobody.
--
-- Invariant: what is leased here was ready, and its row's lock, and its group's, are this transaction's until it ends.
CREATE OR REPLACE FUNCTION filao.receive(
  q integer, moment bigint, process integer, lease bigint, token bigint, most integer, waiting integer
) RETURNS TABLE (
  id bigint, priority integer, attempts integer, grp text, dedup_key text, message_id text, headers text, kind smallint,
  content bytea, sent_at bigint, failures integer, crashed boolean, salt bigint, due_in bigint
)
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
  now    bigint := filao.now(moment);
  rules  filao.queue;
  seen   filao.seen;
  found  bigint := 0;
  got    bigint;
  spots  tid[];
  i      integer := 1;
BEGIN
  SELECT * INTO STRICT rules FROM filao.queue WHERE id = q;
  seen := filao.look_at_times(q, filao.look(q, filao.seen(q)), now);
  IF NOT rules.paused THEN
    IF filao.make_due(q, seen, now) THEN
      seen := filao.look(q, seen);  -- what has just become ready
    END IF;
    WHILE found < most LOOP
      IF i > cardinality(seen.priorities) AND seen.below IS NOT NULL THEN
        seen := filao.learn(q, seen);
      END IF;
      EXIT WHEN i > cardinality(seen.priorities);
      seen.floors[i] := filao.first_ready(q, seen.priorities[i], seen.floors[i]);
      IF seen.floors[i] IS NULL THEN
        seen.priorities := seen.priorities[:i - 1] || seen.priorities[i + 1:];
        seen.floors := seen.floors[:i - 1] || seen.floors[i + 1:];
        CONTINUE;
      END IF;
      spots := filao.pick_ready(q, seen.priorities[i], seen.floors[i], now, most - found);
      RETURN QUERY
        WITH leased AS (
          UPDATE filao.message AS m
          SET state = 'leased', at = now + coalesce(lease, rules.lease), token = receive.token,
              moved_in = filao.news_of(coalesce(lease, rules.lease)), attempts = m.attempts + 1
          WHERE m.ctid = ANY (spots)
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
      GET DIAGNOSTICS got = ROW_COUNT;
      IF got < cardinality(spots) THEN
        PERFORM filao.skipped('filao.message');
      END IF;
      found := found + got;
      i := i + 1;
    END LOOP;
    IF found > 0 AND rules.kept_for IS NOT NULL THEN
      INSERT INTO filao.event (queue, message, at, until, what, attempt, who, detail)
      SELECT rules.name, filao.name_of(m), now, now + rules.kept_for, 'received', m.attempts,
             filao.process_name(receive.process), ''
      FROM filao.message m
      WHERE m.queue = q AND m.state = 'leased' AND m.at = now + coalesce(receive.lease, rules.lease)
        AND m.token = receive.token
      ORDER BY m.id;
      GET DIAGNOSTICS got = ROW_COUNT;
      IF got < found THEN
        PERFORM filao.skipped('filao.event');
      END IF;
    END IF;
    IF found > 0 THEN
      seen.leased := least(seen.leased, now + coalesce(lease, rules.lease));
      PERFORM filao.count(q, ARRAY['ready', 'leased', 'received'], ARRAY[-found, found, found]);
    END IF;
  END IF;
  IF found < greatest(waiting, 1) THEN
    seen := filao.look_at_times(q, seen, now, ahead => true);
  END IF;
  PERFORM filao.remember_seen(q, seen);
  IF found < greatest(waiting, 1) THEN
    id := NULL; content := NULL;
    IF NOT rules.paused THEN  -- else those who wait would look again and again; a queue that is resumed calls them
      due_in := filao.due_in(seen, now);
    END IF;
    IF waiting > 0 AND filao.wait(q, process, waiting - found::integer) THEN
      due_in := 0;
    END IF;
    RETURN NEXT;
  END IF;
END
$$;

-- Milliseconds until the next delayed message or running lease is due; NULL when none was seen. What is due by now and
-- was not taken is locked by somebody's transaction, which may last: those who wait must not look again and again.
CREATE OR REPLACE FUNCTION filao.due_in(seen filao.seen, now bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  locked CONSTANT integer := 250;  -- milliseconds until the next look for it
  due    bigint := least(seen.delayed, seen.leased);
BEGIN
  RETURN CASE WHEN due <= now THEN locked ELSE due - now END;
END
$$;

-- Put a process on the waiting list; false when it stood there, which writes nothing. Its place there is a setting of
-- the session, as in seen.sql.
CREATE OR REPLACE FUNCTION filao.wait(q integer, p integer, wanted integer) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  setting text   := filao.setting('place', q, 'filao.waiting') || '_' || p;
  place   bigint := nullif(current_setting(setting, true), '');
BEGIN
  IF EXISTS (SELECT FROM filao.waiting WHERE queue = q AND since = place AND process = p) THEN
    RETURN false;
  END IF;
  place := nextval('filao.place');
  INSERT INTO filao.waiting (queue, since, process, wants) VALUES (q, place, p, wanted);
  IF NOT FOUND THEN  -- or its callers would look again and again
    PERFORM filao.skipped('filao.waiting');
  END IF;
  PERFORM set_config(setting, place::text, false);
  RETURN true;
END
$$;

-- The first place on the waiting list of a queue; NULL when nobody waits.
--
-- Who was called is not looked at again: the session remembers where the list began, less a margin for places that were
-- taken before and are listed after. Who is overlooked so finds what there is by polling.
CREATE OR REPLACE FUNCTION filao.first_waiting(q integer) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  margin  CONSTANT integer := 200;  -- places
  setting text   := filao.setting('called', q, 'filao.waiting');
  floor   bigint := coalesce(nullif(current_setting(setting, true), '')::bigint, 0);
  last    bigint := pg_sequence_last_value('filao.place');  -- before the look: who comes later is listed behind it
  first   bigint := (SELECT since FROM filao.waiting WHERE queue = q AND since >= floor ORDER BY queue, since LIMIT 1);
  begins  bigint := coalesce(first, CASE WHEN floor > 0 THEN last END);  -- most queues never had a list
BEGIN
  IF begins > floor + 2 * margin THEN
    PERFORM set_config(setting, (begins - margin)::text, false);
  END IF;
  RETURN first;
END
$$;

-- Call those who have waited longest: enough of them for so many messages, each on a channel of its own, so that nobody
-- wakes up in vain. Not in the transaction that sent: a NOTIFY is a lock that all commits wait for.
CREATE OR REPLACE FUNCTION filao.call(queues integer[], amounts integer[]) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  q      integer;
  wanted bigint;
  first  bigint;
  w      record;
BEGIN
  FOR q, wanted IN SELECT * FROM unnest(queues, amounts) LOOP
    first := filao.first_waiting(q);
    CONTINUE WHEN first IS NULL;  -- as mostly
    FOR w IN
      SELECT t.ctid, t.* FROM filao.waiting t
      WHERE t.queue = q AND t.since >= first ORDER BY t.queue, t.since LIMIT 100 FOR UPDATE SKIP LOCKED
    LOOP  -- those who are being called by another are called by them
      EXIT WHEN wanted <= 0;
      DELETE FROM filao.waiting t WHERE t.ctid = w.ctid;
      PERFORM pg_notify('filao_' || w.process, q::text);
      wanted := wanted - w.wants;
    END LOOP;
  END LOOP;
END
$$;
