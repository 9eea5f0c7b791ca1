-- What operators do.

-- The numbers of the messages that an operator's command is about, eight bytes each: those in these states, or of these
-- ids, `most` at most. They are fixed when the command begins, because what is done to one message may let another of
-- its group through.
CREATE OR REPLACE FUNCTION filao.mark(q integer, states filao.state[], ids text[], most bigint) RETURNS bytea
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  marked bytea;
BEGIN
  IF ids IS NULL THEN
    EXECUTE format('SELECT string_agg(int8send(id), '''') FROM (%s) AS found', (
      SELECT string_agg(
        format(  -- each state is found through its own index; but all in one look
          '(SELECT id FROM filao.message WHERE queue = $1 AND state = %L %s LIMIT $2)',
          s, CASE s WHEN 'dead' THEN 'ORDER BY id' WHEN 'blocked' THEN 'AND grp IS NOT NULL' END
        ), ' UNION ALL '
      )
      FROM unnest(states) AS s
    )) INTO marked USING q, most;
  ELSE
    SELECT string_agg(int8send(found.id), '') INTO marked
    FROM (
      SELECT m.id FROM filao.message m
      -- looked up once, not for each row
      WHERE m.id = ANY (ARRAY(SELECT filao.number_of(q, name) FROM unnest(ids) AS name))
        AND m.queue = q AND m.state = ANY (states)
      ORDER BY m.id LIMIT most
    ) AS found;
  END IF;
  RETURN coalesce(marked, '');
END
$$;

-- Those of the marked messages that are still in these states: locked.
CREATE OR REPLACE FUNCTION filao.chosen(q integer, states filao.state[], marked bigint[]) RETURNS SETOF bigint
LANGUAGE sql VOLATILE AS $$
  SELECT id FROM filao.message
  WHERE id = ANY (marked) AND queue = q AND state = ANY (states)
  ORDER BY id FOR UPDATE
$$;

-- Give marked dead letters back with fresh attempts, each to its old place; return how many there were.
CREATE OR REPLACE FUNCTION filao.redrive(
  q integer, moment bigint, marked bigint[], new_kind smallint, new_content bytea, new_headers text, OUT done integer
) LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now    bigint := filao.now(moment);
  chosen bigint[] := ARRAY(SELECT id FROM filao.chosen(q, '{dead}', marked) AS id);
  m      record;
BEGIN
  FOR m IN
    SELECT t.dedup_key, filao.name_of(t) AS name FROM filao.message t
    WHERE t.id = ANY (chosen) AND t.dedup_key IS NOT NULL
  LOOP
    PERFORM filao.remember_again(q, m.dedup_key, m.name, now);
  END LOOP;
  PERFORM filao.hold_groups(q, filao.groups_of(chosen), (SELECT min(id) FROM unnest(chosen) AS id));
  PERFORM filao.give_back(q, chosen, NULL, false, 0, 0, now, false);
  UPDATE filao.message
  SET attempts = 0, reason = NULL, expires_at = NULL, kind = coalesce(new_kind, kind),
      content = coalesce(new_content, content), headers = coalesce(new_headers, headers)
  WHERE id = ANY (chosen);
  GET DIAGNOSTICS done = ROW_COUNT;
  IF done < cardinality(chosen) THEN
    PERFORM filao.skipped('filao.message');
  END IF;
  PERFORM filao.note(q, chosen, 'redriven', filao.caller(),
                     CASE WHEN new_content IS NOT NULL THEN array_fill('edited'::text, ARRAY[done]) END, now);
  PERFORM filao.count(q, ARRAY['redriven'], ARRAY[done]);
END
$$;

-- Delete marked messages, and return how many there were; a consumer that holds one loses its lease. A purge starts
-- afresh: what it removed may be sent again at once.
CREATE OR REPLACE FUNCTION filao.remove(
  q integer, moment bigint, states filao.state[], purges boolean, marked bigint[], OUT done integer
) LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now    bigint := filao.now(moment);
  chosen bigint[] := ARRAY(SELECT id FROM filao.chosen(q, states, marked) AS id);
BEGIN
  done := cardinality(chosen);
  IF purges THEN
    PERFORM filao.forget_all_keys(q, chosen, true);
  END IF;
  PERFORM filao.discard(q, chosen, CASE WHEN purges THEN 'purged' ELSE 'cancelled' END, now, false);
END
$$;

-- Make ready all that is due, for those who are about to carry messages away.
CREATE OR REPLACE FUNCTION filao.make_all_due(q integer, moment bigint) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
BEGIN
  PERFORM filao.make_due(q, filao.nothing_seen(), filao.now(moment));
END
$$;

-- Give messages that were just stored, and came from elsewhere, their past. What is NULL among `reasons` waits.
CREATE OR REPLACE FUNCTION filao.amend(
  q integer, moment bigint, numbers bigint[], attempts integer[], failures integer[], sent bigint[], expires bigint[],
  reasons text[], died bigint[], dedup_keys text[]
) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  now     bigint := filao.now(moment);
  m       filao.message;
  amended bigint;
BEGIN
  UPDATE filao.message AS s SET attempts = t.attempts, failures = t.failures, sent_at = t.sent, expires_at = t.expires
  FROM unnest(numbers, attempts, failures, sent, expires) AS t (number, attempts, failures, sent, expires)
  WHERE s.id = t.number;
  GET DIAGNOSTICS amended = ROW_COUNT;
  IF amended < cardinality(numbers) THEN
    PERFORM filao.skipped('filao.message');
  END IF;
  FOR i IN 1 .. cardinality(numbers) LOOP
    CONTINUE WHEN reasons[i] IS NULL;
    SELECT * INTO m FROM filao.message WHERE id = numbers[i];
    UPDATE filao.message
    SET state = 'dead', at = died[i], reason = reasons[i], dedup_key = dedup_keys[i], moved_in = NULL
    WHERE id = m.id;
    IF NOT FOUND THEN
      PERFORM filao.skipped('filao.message');
    END IF;
    PERFORM filao.count_move(q, m.state, 'dead');
    PERFORM filao.count(q, ARRAY['dead:' || reasons[i]], ARRAY[1]);
    PERFORM filao.arrange(q, m.grp, now, false);
  END LOOP;
END
$$;

-- How many messages a queue holds: none only if there is none, whatever the counters say.
CREATE OR REPLACE FUNCTION filao.held(q integer) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT CASE WHEN EXISTS (SELECT FROM filao.message WHERE queue = q AND state = 'ready')
                OR EXISTS (SELECT FROM filao.message WHERE queue = q AND state = 'delayed')
                OR EXISTS (SELECT FROM filao.message WHERE queue = q AND state = 'leased')
                OR EXISTS (SELECT FROM filao.message WHERE queue = q AND state = 'dead')
                OR EXISTS (SELECT FROM filao.message WHERE queue = q AND state = 'blocked' AND grp IS NOT NULL)
    THEN greatest(1, (
      SELECT sum(value)::bigint FROM filao.counter
      WHERE queue = q AND name IN ('ready', 'delayed', 'leased', 'blocked', 'dead')
    )) ELSE 0 END
$$;

-- Delete a queue that holds no message, with all that is remembered of it; returns how many it holds, or NULL while a
-- transaction that has sent to it is open: each holds a lock that all senders of a queue share. Nobody waits here, so
-- that nobody waits for a deletion.
CREATE OR REPLACE FUNCTION filao.delete(q integer) RETURNS bigint
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  held bigint;
BEGIN
  held := filao.held(q);
  IF held > 0 THEN
    RETURN held;
  ELSIF NOT pg_try_advisory_xact_lock(1718184290, q) THEN
    RETURN NULL;
  END IF;
  held := filao.held(q);
  IF held = 0 THEN
    DELETE FROM filao.dedup WHERE queue = q;
    DELETE FROM filao.halted WHERE queue = q;
    DELETE FROM filao.unarranged WHERE queue = q;
    DELETE FROM filao.floor WHERE queue = q;
    DELETE FROM filao.waiting WHERE queue = q;
    DELETE FROM filao.counter WHERE queue = q;
    DELETE FROM filao.queue WHERE id = q;
    IF EXISTS (SELECT FROM filao.queue WHERE id = q) THEN
      PERFORM filao.skipped('filao.queue');
    END IF;
  END IF;
  RETURN held;
END
$$;

-- Stop a group, as a dead letter of it does.
CREATE OR REPLACE FUNCTION filao.halt_group(q integer, moment bigint, g text) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
BEGIN
  PERFORM filao.halt(q, ARRAY[g]);
  PERFORM filao.arrange(q, g, filao.now(moment), false);
END
$$;

-- Let halted groups go on: one, or with NULL all of a queue.
CREATE OR REPLACE FUNCTION filao.unhalt(q integer, g text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  held tid[] := ARRAY(SELECT ctid FROM filao.halted WHERE queue = q AND grp = coalesce(g, grp) FOR UPDATE);
  gone bigint;
BEGIN
  DELETE FROM filao.halted WHERE ctid = ANY (held);
  GET DIAGNOSTICS gone = ROW_COUNT;
  IF gone < cardinality(held) THEN
    PERFORM filao.skipped('filao.halted');
  END IF;
END
$$;

-- Let a halted group go on.
CREATE OR REPLACE FUNCTION filao.resume_group(q integer, moment bigint, g text) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
BEGIN
  PERFORM filao.unhalt(q, g);
  PERFORM filao.arrange(q, g, filao.now(moment), false);
END
$$;

-- Create a queue or give it these rules; returns its number. Groups to which other rules apply now are noted down:
-- there may be more than one transaction can have locks for.
CREATE OR REPLACE FUNCTION filao.declare(wanted text, new_rules jsonb, moment bigint) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  was     filao.queue;
  becomes filao.queue;
BEGIN
  SELECT * INTO was FROM filao.queue WHERE name = wanted;
  IF FOUND AND was.rules = new_rules THEN
    RETURN was.id;  -- most declarations, and no write
  END IF;
  INSERT INTO filao.queue (name, rules) VALUES (wanted, new_rules)
  ON CONFLICT (name) DO UPDATE SET rules = excluded.rules
  RETURNING * INTO becomes;
  IF NOT FOUND THEN
    PERFORM filao.skipped('filao.queue');
  END IF;
  IF was.skips_failed <> becomes.skips_failed OR was.halts_dead <> becomes.halts_dead THEN
    IF NOT becomes.halts_dead THEN
      PERFORM filao.unhalt(becomes.id, NULL);
    END IF;
    PERFORM filao.arrange_all(becomes.id, ARRAY(
      SELECT DISTINCT grp FROM filao.message WHERE queue = becomes.id AND grp IS NOT NULL
    ), NULL, true);
  END IF;
  RETURN becomes.id;
END
$$;

-- Write into the log what somebody is about to do, keep the last `kept` entries, and return its number.
CREATE OR REPLACE FUNCTION filao.begin_deed(
  moment bigint, who text, what text, queue text, about text, wanted bigint, kept bigint
) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  number bigint;
BEGIN
  INSERT INTO filao.audit (at, who, what, queue, about, wanted)
  VALUES (filao.now(moment), begin_deed.who, begin_deed.what, begin_deed.queue, begin_deed.about, begin_deed.wanted)
  RETURNING id INTO number;
  IF NOT FOUND THEN
    PERFORM filao.skipped('filao.audit');
  END IF;
  DELETE FROM filao.audit WHERE id <= number - kept;
  RETURN number;
END
$$;

-- Write down how far it has come; with an outcome it has ended.
CREATE OR REPLACE FUNCTION filao.record_deed(moment bigint, number bigint, how_many bigint, how text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  UPDATE filao.audit
  SET done = how_many, outcome = how, ended_at = CASE WHEN how <> '' THEN filao.now(moment) END
  WHERE id = number;
  IF NOT FOUND AND EXISTS (SELECT FROM filao.audit WHERE id = number) THEN  -- else it was too old to be kept
    PERFORM filao.skipped('filao.audit');
  END IF;
END
$$;

-- The messages of a group in one state, in the order of sending, from the one behind `after`: so many at most. The rows
-- are compared as the index has them, so that nothing else is looked at.
CREATE OR REPLACE FUNCTION filao.of_group(q integer, g text, s filao.state, after bigint, most integer)
RETURNS SETOF bigint
LANGUAGE sql STABLE SET enable_seqscan = off SET jit = off AS $$
  SELECT m.id FROM filao.message m
  WHERE m.queue = q AND (m.grp, m.state, m.id) > (g, s, after) AND (m.grp, m.state) <= (g, s) AND m.grp IS NOT NULL
  ORDER BY m.grp, m.state, m.id LIMIT most
$$;

-- Why the messages of a group wait: halted, or where its first one is.
CREATE OR REPLACE FUNCTION filao.why_held(q integer, g text) RETURNS text
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  s filao.state;
BEGIN
  IF NOT EXISTS (SELECT FROM filao.halted WHERE queue = q AND grp = g) THEN
    FOREACH s IN ARRAY ARRAY['leased', 'ready', 'delayed']::filao.state[] LOOP
      IF EXISTS (SELECT FROM filao.of_group(q, g, s, 0, 1)) THEN
        RETURN s;
      END IF;
    END LOOP;
  END IF;
  RETURN 'halted';
END
$$;
