-- The verbs of a queue, as functions, so that each is one round trip, and so that a send joins a user's transaction on
-- whatever connection holds it. How messages move from state to state is as in engines/sqlite/moves.py.
--
-- Many transactions do this at once (READ COMMITTED). What keeps them apart:
--   * A lease is a row's token. A settle or an extend compares it in the statement that writes, and it is
--     overwritten only when somebody else receives the message.
--   * Whatever looks for work skips rows that others have locked; it never waits for them.
--   * Of a group, only the holder of its advisory lock changes which message is let through. A receive that cannot have
--     the lock at once leaves that message to the next. A batch takes the locks of its groups first, in order.
--   * In a transaction that the user holds, which may last, groups are not locked but noted down (`later`), and
--     arranged by
--     the next receive.

-- A function that is called from outside sets what its plans rest on. They are made once, when a table may be empty,
-- and must serve when it holds millions: so a sequential scan is never right, and no plan is worth compiling. The verbs
-- of every message force such plans: PostgreSQL would think them dearer than plans for the very values, and make these
-- anew at each call, which took longer than the call's own work.

-- The server's wall clock, in milliseconds since 1970.
CREATE OR REPLACE FUNCTION filao.wall() RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT floor(extract(epoch FROM clock_timestamp()) * 1000::numeric)::bigint
$$;

-- By how much the wall clock is ahead when so much time has passed since it was so much ahead: the queues' time follows
-- it by a twentieth of the time that passes, so that a jump changes no duration by more than that.
CREATE OR REPLACE FUNCTION filao.still_ahead(ahead bigint, passed bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE WHEN ahead > 0 THEN greatest(ahead - greatest(passed, 0) / 20, 0)
              ELSE least(ahead + greatest(passed, 0) / 20, 0) END
$$;

-- The queues' time, in milliseconds since 1970, for calls from outside.
CREATE OR REPLACE FUNCTION filao.clock() RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
  RETURN filao.now(NULL);
END
$$;

-- What the wall clock would show if it had never jumped, and the sum of its jumps: see filao.note_jump.
CREATE OR REPLACE FUNCTION filao.even_clock(OUT even bigint, OUT jumped bigint) LANGUAGE plpgsql AS $$
BEGIN
  jumped := coalesce((SELECT (value::bigint[])[1] FROM filao.meta WHERE name = 'clock'), 0);
  even := filao.wall() - jumped;
END
$$;

-- Note that the wall clock jumped by so many milliseconds since the sum of its jumps was `was`, unless somebody did so.
CREATE OR REPLACE FUNCTION filao.note_jump(was bigint, by bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  wall bigint := filao.wall();
  j    bigint[];
BEGIN
  INSERT INTO filao.meta VALUES ('clock', '{0,0,0}') ON CONFLICT DO NOTHING;
  SELECT value::bigint[] INTO j FROM filao.meta WHERE name = 'clock' FOR UPDATE;
  IF j[1] = was THEN
    UPDATE filao.meta SET value = ARRAY[was + by, filao.still_ahead(j[2], wall - by - j[3]) + by, wall]::text
    WHERE name = 'clock';
  END IF;
END
$$;

-- Whether our caller owns the tables, or has the rights of who does, and so is trusted with all that is in them. Since
-- PostgreSQL 16 a role can be a member of another and have none of its rights.
CREATE OR REPLACE FUNCTION filao.is_owner() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  RETURN pg_has_role(
    session_user, (SELECT relowner FROM pg_class WHERE oid = 'filao.message'::regclass),
    CASE WHEN current_setting('server_version_num')::integer < 160000 THEN 'MEMBER' ELSE 'USAGE, SET' END
  );
END
$$;

-- The queues' time. A negative `moment` is what the even clock shows, as far as the caller knows: it is an error when
-- that is not so, for then the wall clock may have jumped, and nobody has noted it. Another is what an owner's test
-- says that it is: in the future all leases, keys and times to live are over.
CREATE OR REPLACE FUNCTION filao.now(moment bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  jump CONSTANT bigint := 1000;  -- as in clock.py
  wall bigint := filao.wall();
  j    bigint[];
BEGIN
  IF moment >= 0 THEN
    IF NOT filao.is_owner() THEN
      RAISE insufficient_privilege USING MESSAGE = 'only the owner of the schema filao may say what time it is';
    END IF;
    RETURN moment;
  END IF;
  SELECT value::bigint[] INTO j FROM filao.meta WHERE name = 'clock';
  IF abs(wall - coalesce(j[1], 0) + moment) > jump THEN
    RAISE SQLSTATE 'FL001' USING MESSAGE = 'the clocks of the server and of the process differ';
  END IF;
  RETURN wall - coalesce(filao.still_ahead(j[2], wall - j[3]), 0);
END
$$;

-- A function that reads tables is in PL/pgSQL, which keeps its plans; one in SQL is planned anew at each call.

-- Fail, and with it the transaction: a statement wrote fewer rows than it was given, whose locks the caller holds. What
-- is not Filao's skips them, such as a trigger that returns NULL, and what was not written must not be confirmed.
CREATE OR REPLACE FUNCTION filao.skipped(held regclass) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  RAISE SQLSTATE 'FL002' USING MESSAGE = format('%s has not taken every row', held);  -- see server.py
END
$$;

-- Add to the counters of a queue; what is named twice is added up. PL/pgSQL runs a condition that holds a query as a
-- query of its own, so there and below the cheap half of it stands before.
CREATE OR REPLACE FUNCTION filao.count(q integer, names text[], amounts bigint[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  counted bigint;
BEGIN
  INSERT INTO filao.counter AS c (queue, backend, slot, name, value)
  SELECT q, pg_backend_pid(), floor(extract(epoch FROM clock_timestamp()) / 2.048)::bigint, given.name,
         sum(given.amount)
  FROM unnest(names, amounts) AS given (name, amount)
  GROUP BY given.name HAVING sum(given.amount) <> 0
  ON CONFLICT (queue, backend, slot, name) DO UPDATE SET value = c.value + excluded.value;
  GET DIAGNOSTICS counted = ROW_COUNT;
  IF counted < cardinality(array_remove(amounts, 0)) THEN  -- or a name stands there twice
    IF counted < (
      SELECT count(*) FROM (
        SELECT FROM unnest(names, amounts) AS given (name, amount) GROUP BY given.name HAVING sum(given.amount) <> 0
      ) AS sums
    ) THEN
      PERFORM filao.skipped('filao.counter');
    END IF;
  END IF;
END
$$;

-- How messages are counted in the states that they are in now, so many `times`; of the dead also why.
CREATE OR REPLACE FUNCTION filao.tally(ids bigint[], times integer, OUT names text[], OUT amounts bigint[])
LANGUAGE plpgsql AS $$
BEGIN
  SELECT coalesce(array_agg(t.name), '{}'), coalesce(array_agg(t.amount), '{}') INTO names, amounts
  FROM (
    SELECT unnest(CASE m.state WHEN 'dead' THEN ARRAY['dead', 'dead:' || coalesce(m.reason, '')]
                  ELSE ARRAY[m.state::text] END) AS name, count(*) * times AS amount
    FROM filao.message m WHERE m.id = ANY (ids) GROUP BY 1
  ) AS t;
END
$$;

CREATE OR REPLACE FUNCTION filao.count_move(q integer, was filao.state, becomes filao.state) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  IF was <> becomes THEN
    PERFORM filao.count(q, ARRAY[was::text, becomes::text], ARRAY[-1, 1]);
  END IF;
END
$$;

-- The first part of ids: random, drawn for each send, so that an id cannot be guessed, and after a restore or a
-- failover is never given again.
CREATE OR REPLACE FUNCTION filao.prefix(salt bigint) RETURNS text LANGUAGE sql IMMUTABLE AS $$
  SELECT lpad(to_hex(salt), 16, '0') || '-'
$$;

-- A message's public id. One from before version 2 has no salt: its first part is the database's name.
CREATE OR REPLACE FUNCTION filao.name_of(m filao.message) RETURNS text LANGUAGE sql STABLE AS $$
  SELECT coalesce(
    m.message_id,
    coalesce(filao.prefix(m.salt), (SELECT value || '-' FROM filao.meta WHERE name = 'database')) || m.id::text
  )
$$;

-- The number of the message with this public id; of one that is gone, the number that it had.
CREATE OR REPLACE FUNCTION filao.number_of(q integer, wanted text) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT coalesce(
    (SELECT m.id FROM filao.message m WHERE m.queue = q AND m.message_id = wanted ORDER BY m.id LIMIT 1),
    (SELECT given.number
     FROM (SELECT substring(wanted, '^[0-9a-f]{16}-([0-9]{1,18})$')::bigint AS number) AS given
     WHERE NOT EXISTS (SELECT FROM filao.message m WHERE m.id = given.number AND filao.name_of(m) <> wanted))
  )
$$;

-- Many contents as one value and their lengths, which is written faster than an array of them. Not in SQL, which would
-- be planned anew by each call.
CREATE OR REPLACE FUNCTION filao.split(joined bytea, lengths integer[]) RETURNS bytea[] LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
  parts bytea[] := '{}';
  ends  integer := 0;
  size  integer;
BEGIN
  FOREACH size IN ARRAY lengths LOOP
    parts := parts || substring(joined FROM ends + 1 FOR size);
    ends := ends + size;
  END LOOP;
  RETURN parts;
END
$$;

-- --- groups ----------------------------------------------------------------------------------------------------------

-- The key of the lock of a group. Groups share 2,048 locks, because a server has room for some 6,400, for all its
-- databases: that groups wait for one another for a moment is better than that nobody gets a lock.
CREATE OR REPLACE FUNCTION filao.group_key(q integer, g text) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
  SELECT 1181314145000000 + (hashtextextended(g, q) & 2047)
$$;

-- Take the locks of groups, in one order for all.
CREATE OR REPLACE FUNCTION filao.lock_groups(queues integer[], groups text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  lock bigint;
BEGIN
  FOR lock IN SELECT DISTINCT filao.group_key(q, g) FROM unnest(queues, groups) AS given (q, g) ORDER BY 1 LOOP
    PERFORM pg_advisory_xact_lock(lock);
  END LOOP;
END
$$;

-- Move messages from one state to another, as far as they are in it; return how many were. Who has the group's lock may
-- meet some that are being removed.
CREATE OR REPLACE FUNCTION filao.set_states(ids bigint[], was filao.state, becomes filao.state) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
  moved bigint := 0;
BEGIN
  IF cardinality(ids) > 0 THEN
    UPDATE filao.message SET state = becomes, moved_in = pg_current_xact_id() WHERE id = ANY (ids) AND state = was;
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved < cardinality(ids) THEN
      IF EXISTS (SELECT FROM filao.message WHERE id = ANY (ids) AND state = was) THEN
        PERFORM filao.skipped('filao.message');
      END IF;
    END IF;
  END IF;
  RETURN moved;
END
$$;

-- Take the locks of the groups of a queue, in one order for all. `born` is the lowest id that is sent or sent back to
-- one of them; NULL: none is. Nothing else comes below their floors.
CREATE OR REPLACE FUNCTION filao.hold_groups(q integer, groups text[], born bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_advisory_xact_lock(wanted.lock)
  FROM (SELECT DISTINCT filao.group_key(q, g) AS lock FROM unnest(groups) AS g ORDER BY 1) AS wanted;
  IF born IS NOT NULL AND EXISTS (SELECT FROM filao.floor f WHERE f.queue = q) THEN
    DELETE FROM filao.floor f WHERE f.queue = q AND f.grp = ANY (groups) AND f.lowest > born;
    IF EXISTS (SELECT FROM filao.floor f WHERE f.queue = q AND f.grp = ANY (groups) AND f.lowest > born) THEN
      PERFORM filao.skipped('filao.floor');
    END IF;
  END IF;
END
$$;

-- The lowest id that a message of a group may have.
CREATE OR REPLACE FUNCTION filao.floor_of(q integer, g text, file oid) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
  RETURN coalesce((
    SELECT f.lowest FROM filao.floor f WHERE f.queue = q AND f.grp = g AND f.file = floor_of.file
    ORDER BY f.queue DESC, f.grp DESC, f.lowest DESC LIMIT 1
  ), 0);
END
$$;

-- The first message of a group in a state, from an id on. The index of groups alone can serve a comparison of (grp,
-- state, id), whatever the tables hold. In SQL and STABLE, this becomes part of the query that calls it, and its plan.
CREATE OR REPLACE FUNCTION filao.first_of(q integer, g text, s filao.state, from_id bigint)
RETURNS TABLE (id bigint, at bigint) LANGUAGE sql STABLE AS $$
  SELECT m.id, m.at FROM filao.message m
  WHERE m.queue = q AND (m.grp, m.state, m.id) >= (g, s, from_id) AND (m.grp, m.state) <= (g, s) AND m.grp IS NOT NULL
  ORDER BY m.grp, m.state, m.id LIMIT 1
$$;

-- Note down where groups begin, whose locks the caller holds: what a batch sends to an empty one has a number that is
-- not drawn yet.
CREATE OR REPLACE FUNCTION filao.raise_floors(q integer, groups text[], file oid, now bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  next bigint := coalesce(pg_sequence_last_value('filao.number'), 0) + 1;
BEGIN
  INSERT INTO filao.floor (queue, grp, lowest, file, at)
  SELECT q, given.g, coalesce(min(first.id), next), raise_floors.file, now
  FROM (SELECT DISTINCT g, filao.floor_of(q, g, raise_floors.file) AS from_id FROM unnest(groups) AS g) AS given
  LEFT JOIN LATERAL (
    SELECT m.id
    FROM unnest('{ready,delayed,leased,blocked}'::filao.state[]) AS s, filao.first_of(q, given.g, s, given.from_id) AS m
  ) AS first ON true
  GROUP BY given.g
  ON CONFLICT DO NOTHING;
END
$$;

-- Let the first message of each of some groups through and hold back the others; nobody moves while one is leased.
--
-- Invariant, for who holds a group's lock: at most one of its messages is ready or leased, and it is the first; what
-- stands behind that is blocked. Where failed messages are skipped, the delayed ones do not count.
--
-- Of all groups at once the first message in each state is looked up; the first of these is the head, but a group that
-- halts has none. Where failed messages are skipped, a head that is not due yet steps aside, and its group is looked at
-- again.
CREATE OR REPLACE FUNCTION filao.arrange_all(
  q integer, groups text[], now bigint, later boolean, born bigint = NULL
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  much    CONSTANT integer := 500;  -- entries of the index, which take some 0.2 ms
  file    oid := pg_relation_filenode('filao.message');
  pending text[] := groups;  -- to be looked at
  floors  boolean;  -- whether there are any
  walked  bigint;
  skips   boolean;
  halts   boolean;
  due     bigint[];  -- heads that were blocked, to be let through
  early   bigint[];  -- the same, with a delay that is not over
  ready   bigint[];  -- not heads, to be held back
  delayed bigint[];
  more_ready   bigint := 0;
  more_delayed bigint := 0;
  noted        bigint;
BEGIN
  IF later THEN
    INSERT INTO filao.unarranged (queue, grp, lowest) SELECT q, given.g, born FROM unnest(groups) AS given (g);
    GET DIAGNOSTICS noted = ROW_COUNT;
    IF noted < cardinality(groups) THEN
      PERFORM filao.skipped('filao.unarranged');
    END IF;
    RETURN;
  END IF;
  SELECT skips_failed, halts_dead INTO STRICT skips, halts FROM filao.queue WHERE id = q;
  PERFORM filao.hold_groups(q, groups, born);
  floors := EXISTS (SELECT FROM filao.floor f WHERE f.queue = q);  -- mostly there are none
  walked := pg_stat_get_xact_tuples_returned('filao.message_grouped'::regclass);
  WHILE cardinality(pending) > 0 LOOP
    SELECT array_agg(f.blocked) FILTER (WHERE f.blocked = f.head AND f.at <= now),
           array_agg(f.blocked) FILTER (WHERE f.blocked = f.head AND f.at > now),
           array_agg(f.ready) FILTER (WHERE f.ready IS NOT NULL AND f.ready IS DISTINCT FROM f.head),
           array_agg(f.delayed) FILTER (WHERE f.delayed <> f.head),
           array_agg(f.g) FILTER (WHERE f.blocked = f.head AND f.at > now AND skips)
    INTO due, early, ready, delayed, pending
    FROM (
      SELECT given.g, r.id AS ready, d.id AS delayed, b.id AS blocked, b.at,
             CASE WHEN NOT halts OR NOT EXISTS (SELECT FROM filao.halted h WHERE h.queue = q AND h.grp = given.g)
               THEN least(r.id, d.id, b.id) END AS head
      FROM (SELECT DISTINCT g FROM unnest(pending) AS g) AS given
      CROSS JOIN LATERAL (SELECT CASE WHEN floors THEN filao.floor_of(q, given.g, file) ELSE 0 END AS id) AS floor
      LEFT JOIN LATERAL filao.first_of(q, given.g, 'leased', floor.id) AS l ON true
      LEFT JOIN LATERAL filao.first_of(q, given.g, 'ready', floor.id) AS r ON l.id IS NULL
      LEFT JOIN LATERAL (
        SELECT * FROM filao.first_of(q, given.g, 'delayed', floor.id) WHERE NOT skips  -- or it is overtaken
      ) AS d ON l.id IS NULL
      LEFT JOIN LATERAL filao.first_of(q, given.g, 'blocked', floor.id) AS b ON l.id IS NULL
      WHERE l.id IS NULL
    ) AS f;
    more_ready := more_ready + filao.set_states(due, 'blocked', 'ready') - filao.set_states(ready, 'ready', 'blocked');
    more_delayed := more_delayed + filao.set_states(early, 'blocked', 'delayed')
                    - filao.set_states(delayed, 'delayed', 'blocked');
  END LOOP;
  walked := pg_stat_get_xact_tuples_returned('filao.message_grouped'::regclass) - walked;
  IF walked > greatest(much, 20 * cardinality(groups)) THEN
    PERFORM filao.raise_floors(q, groups, file, now);
  END IF;
  PERFORM filao.count(q, ARRAY['ready', 'delayed', 'blocked'],
                      ARRAY[more_ready, more_delayed, -more_ready - more_delayed]);
END
$$;

-- Let the first message of a group through, if there is a group.
CREATE OR REPLACE FUNCTION filao.arrange(q integer, g text, now bigint, later boolean) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  IF g IS NOT NULL THEN
    PERFORM filao.arrange_all(q, ARRAY[g], now, later);
  END IF;
END
$$;

-- See to groups that were noted down, from a transaction on, as far as nobody else has their locks; return how many
-- notes are done with.
CREATE OR REPLACE FUNCTION filao.arrange_noted(q integer, now bigint, since xid8 = '0') RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  most   CONSTANT integer := 500;  -- notes in one transaction
  notes  tid[];
  groups text[];
  lowest bigint;
  gone   bigint;
BEGIN
  SELECT * INTO notes, groups, lowest FROM filao.pick_noted(q, since, most);
  IF notes IS NULL THEN
    RETURN 0;
  END IF;
  DELETE FROM filao.unarranged WHERE ctid = ANY (notes);
  GET DIAGNOSTICS gone = ROW_COUNT;
  IF gone < cardinality(notes) THEN
    PERFORM filao.skipped('filao.unarranged');
  END IF;
  PERFORM filao.arrange_all(q, groups, now, false, lowest);
  RETURN cardinality(notes);
END
$$;

-- --- deduplication ---------------------------------------------------------------------------------------------------

-- The id of the message that came first under one of these keys; NULL when both are new.
CREATE OR REPLACE FUNCTION filao.remembered(q integer, dedup_key text, message_id text, now bigint) RETURNS text
LANGUAGE sql VOLATILE AS $$
  SELECT d.message
  FROM filao.dedup d
  WHERE d.queue = q AND ((d.kind = 'k' AND d.key = dedup_key) OR (d.kind = 'm' AND d.key = message_id))
    AND (d.until IS NULL OR d.until > now)
  ORDER BY d.kind
  LIMIT 1
$$;

-- Know a new message's key as long as it is pending; false when another message has it, whatever that one is called:
-- two that were sent at the same time under one message_id have the same name.
CREATE OR REPLACE FUNCTION filao.remember(q integer, k "char", wanted text, name text, now bigint) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO filao.dedup AS d (queue, kind, key, message) VALUES (q, k, wanted, name)
  ON CONFLICT (queue, kind, key) DO UPDATE SET message = excluded.message, until = NULL
  WHERE d.until <= now;
  RETURN FOUND;
END
$$;

-- Know the key of a message that comes back, if no other message has it by now.
CREATE OR REPLACE FUNCTION filao.remember_again(q integer, wanted text, name text, now bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO filao.dedup AS d (queue, kind, key, message) VALUES (q, 'k', wanted, name)
  ON CONFLICT (queue, kind, key) DO UPDATE SET message = excluded.message, until = NULL
  WHERE d.until <= now OR d.message = excluded.message;
  IF NOT FOUND AND NOT EXISTS (  -- a row that is another's is locked by now
    SELECT FROM filao.dedup d
    WHERE d.queue = q AND d.kind = 'k' AND d.key = wanted AND d.message <> name AND coalesce(d.until > now, true)
  ) THEN
    PERFORM filao.skipped('filao.dedup');
  END IF;
END
$$;

-- Forget the keys of a message at once.
CREATE OR REPLACE FUNCTION filao.forget_keys(q integer, dedup_key text, message_id text, name text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  gone bigint;
BEGIN
  DELETE FROM filao.dedup d
  WHERE d.queue = q AND d.message = name
    AND ((d.kind = 'k' AND d.key = dedup_key) OR (d.kind = 'm' AND d.key = message_id));
  GET DIAGNOSTICS gone = ROW_COUNT;
  IF gone < num_nonnulls(dedup_key, message_id) THEN  -- or another message has the key, or nobody
    IF EXISTS (
      SELECT FROM filao.dedup d
      WHERE d.queue = q AND d.message = name
        AND ((d.kind = 'k' AND d.key = dedup_key) OR (d.kind = 'm' AND d.key = message_id))
    ) THEN
      PERFORM filao.skipped('filao.dedup');
    END IF;
  END IF;
END
$$;

-- Know the keys of a new message, or return the id of the one that came first. A send of the same at the same time
-- waits here until the other has committed. A message that outlived its time to live has no key, whether or not anybody
-- has looked at it since.
CREATE OR REPLACE FUNCTION filao.claim_keys(
  q integer, dedup_key text, message_id text, name text, now bigint, later boolean
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  most       CONSTANT integer := 1000;  -- others that came first and are gone already, in a row
  came_first text;
BEGIN
  FOR i IN 1 .. most LOOP
    came_first := filao.remembered(q, dedup_key, message_id, now);
    IF came_first IS NOT NULL THEN
      CONTINUE WHEN filao.expire_named(q, came_first, now, later);
      IF came_first = filao.remembered(q, dedup_key, message_id, now) THEN
        RETURN came_first;
      END IF;
      CONTINUE;  -- somebody else has just let it expire
    END IF;
    IF dedup_key IS NULL OR filao.remember(q, 'k', dedup_key, name, now) THEN
      IF message_id IS NULL OR filao.remember(q, 'm', message_id, name, now) THEN
        RETURN NULL;
      END IF;
      PERFORM filao.forget_keys(q, dedup_key, NULL, name);
    END IF;
  END LOOP;
  PERFORM filao.skipped('filao.dedup');
END
$$;

-- Let the keys of a message that has ended be forgotten after the queue's window.
CREATE OR REPLACE FUNCTION filao.start_window(q integer, dedup_key text, message_id text, name text, now bigint)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  ends   bigint := now + (SELECT dedup_window FROM filao.queue WHERE id = q);
  ending bigint;
BEGIN
  UPDATE filao.dedup d SET until = ends
  WHERE d.queue = q AND d.message = name
    AND ((d.kind = 'k' AND d.key = dedup_key) OR (d.kind = 'm' AND d.key = message_id));
  GET DIAGNOSTICS ending = ROW_COUNT;
  IF ending < num_nonnulls(dedup_key, message_id) THEN  -- or another message has the key, or nobody
    IF EXISTS (
      SELECT FROM filao.dedup d
      WHERE d.queue = q AND d.message = name AND d.until IS DISTINCT FROM ends
        AND ((d.kind = 'k' AND d.key = dedup_key) OR (d.kind = 'm' AND d.key = message_id))
    ) THEN
      PERFORM filao.skipped('filao.dedup');
    END IF;
  END IF;
END
$$;

-- --- moves -----------------------------------------------------------------------------------------------------------

-- These move many messages of one queue at once, which the caller has locked, and each counts what it does once: a
-- counter that is written for each message is a chain of versions that every next write walks. What few messages have,
-- keys and histories, is seen to one by one. Each ends by letting the groups go on.

-- The groups of messages.
CREATE OR REPLACE FUNCTION filao.groups_of(ids bigint[]) RETURNS text[] LANGUAGE plpgsql AS $$
BEGIN
  RETURN ARRAY(SELECT DISTINCT m.grp FROM filao.message m WHERE m.id = ANY (ids) AND m.grp IS NOT NULL);
END
$$;

-- Who runs this: the host and process, which a connection of ours says, or what the user's own says.
CREATE OR REPLACE FUNCTION filao.caller() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
  RETURN regexp_replace(coalesce(nullif(current_setting('application_name'), ''), session_user::text), '^filao ', '');
END
$$;

-- Who receives, by the number of the process.
CREATE OR REPLACE FUNCTION filao.process_name(p integer) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
  RETURN coalesce((SELECT name FROM filao.process WHERE id = p), '');
END
$$;

-- Put an event into the history of messages, if their queue keeps one: who did it, to all (`who`) or to each (`whos`),
-- and more of it. See filao.engine.Event.
CREATE OR REPLACE FUNCTION filao.note(
  q integer, ids bigint[], what text, who text, details text[], now bigint, whos text[] = NULL
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  rules filao.queue;
  noted bigint;
BEGIN
  SELECT * INTO rules FROM filao.queue WHERE id = q;
  IF rules.kept_for IS NULL THEN
    RETURN;
  END IF;
  INSERT INTO filao.event (queue, message, at, until, what, attempt, who, detail)
  SELECT rules.name, filao.name_of(m), now, now + rules.kept_for, note.what, m.attempts,
         coalesce(whos[array_position(ids, m.id)], note.who, ''), coalesce(details[array_position(ids, m.id)], '')
  FROM filao.message m WHERE m.id = ANY (ids)
  ORDER BY array_position(ids, m.id);
  GET DIAGNOSTICS noted = ROW_COUNT;
  IF noted < cardinality(ids) THEN
    PERFORM filao.skipped('filao.event');
  END IF;
END
$$;

-- Put a failed attempt into the history of each message, which keeps the last 20; who moves them then adds to
-- `failures`.
CREATE OR REPLACE FUNCTION filao.record(
  q integer, ids bigint[], outcome text, errors text[], consumers text[], now bigint
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  recorded bigint;
  full_up  bigint;
BEGIN
  INSERT INTO filao.failure (message, attempt, at, outcome, error, consumer)
  SELECT m.id, m.attempts, now, outcome, coalesce(given.error, ''), coalesce(given.consumer, '')
  FROM unnest(ids, errors, consumers) WITH ORDINALITY AS given (id, error, consumer, n), LATERAL (
    SELECT t.id, t.attempts FROM filao.message t WHERE t.id = given.id
  ) AS m
  ORDER BY given.n;
  GET DIAGNOSTICS recorded = ROW_COUNT;
  IF recorded < cardinality(ids) THEN
    PERFORM filao.skipped('filao.failure');
  END IF;
  PERFORM filao.note(q, ids, outcome, NULL, errors, now, consumers);
  FOR full_up IN SELECT m.id FROM filao.message m WHERE m.id = ANY (ids) AND m.failures >= 20 LOOP
    DELETE FROM filao.failure
    WHERE id IN (SELECT f.id FROM filao.failure f WHERE f.message = full_up ORDER BY f.id DESC OFFSET 20);
  END LOOP;
END
$$;

-- Let messages return to their old places: ready now, or delayed until their `dues`; behind those of their groups. They
-- keep their tokens or not, and get `failed` more failures and `used` more attempts.
CREATE OR REPLACE FUNCTION filao.give_back(
  q integer, ids bigint[], dues bigint[], keeps boolean, failed integer, used integer, now bigint, later boolean
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  was     record;
  becomes record;
  given   bigint;
BEGIN
  SELECT * INTO was FROM filao.tally(ids, -1);
  UPDATE filao.message AS t
  SET state = CASE WHEN dues[array_position(ids, t.id)] IS NOT NULL THEN 'delayed'
                   WHEN t.grp IS NULL THEN 'ready' ELSE 'blocked' END::filao.state,
      at = coalesce(dues[array_position(ids, t.id)], now), token = CASE WHEN keeps THEN t.token ELSE 0 END,
      failures = t.failures + failed, attempts = t.attempts + used, moved_in = pg_current_xact_id()
  WHERE t.id = ANY (ids);
  GET DIAGNOSTICS given = ROW_COUNT;
  IF given < cardinality(ids) THEN
    PERFORM filao.skipped('filao.message');
  END IF;
  SELECT * INTO becomes FROM filao.tally(ids, 1);
  PERFORM filao.count(q, was.names || becomes.names, was.amounts || becomes.amounts);
  PERFORM filao.arrange_all(q, filao.groups_of(ids), now, later);
END
$$;

-- Let groups wait for an operator.
CREATE OR REPLACE FUNCTION filao.halt(q integer, groups text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  most CONSTANT integer := 3;  -- tries: somebody may let one that was halted go on meanwhile
BEGIN
  FOR i IN 1 .. most LOOP
    INSERT INTO filao.halted (queue, grp) SELECT q, g FROM unnest(groups) AS g ON CONFLICT DO NOTHING;
    IF (SELECT count(*) FROM filao.halted h WHERE h.queue = q AND h.grp = ANY (groups)) = cardinality(groups) THEN
      RETURN;
    END IF;
  END LOOP;
  PERFORM filao.skipped('filao.halted');
END
$$;

-- Make messages dead letters, whose last attempt has been recorded.
CREATE OR REPLACE FUNCTION filao.die(q integer, ids bigint[], why text, now bigint, later boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  was    record;
  died   bigint;
  groups text[] := filao.groups_of(ids);
  m      record;
BEGIN
  PERFORM filao.note(q, ids, 'died', NULL, array_fill(why, ARRAY[cardinality(ids)]), now);
  SELECT * INTO was FROM filao.tally(ids, -1);
  UPDATE filao.message
  SET state = 'dead', at = now, token = 0, reason = why, failures = failures + 1, moved_in = NULL
  WHERE id = ANY (ids);
  GET DIAGNOSTICS died = ROW_COUNT;
  IF died < cardinality(ids) THEN
    PERFORM filao.skipped('filao.message');
  END IF;
  PERFORM filao.count(q, was.names || ARRAY['dead', 'died', 'dead:' || why, 'died:' || why],
                      was.amounts || array_fill(died, ARRAY[4]));
  FOR m IN  -- a message_id stays known as long as the dead letter lies there
    SELECT t.dedup_key, filao.name_of(t) AS name FROM filao.message t WHERE t.id = ANY (ids) AND t.dedup_key IS NOT NULL
  LOOP
    PERFORM filao.start_window(q, m.dedup_key, NULL, m.name, now);
  END LOOP;
  IF cardinality(groups) > 0 AND (SELECT halts_dead FROM filao.queue WHERE id = q) THEN
    PERFORM filao.halt(q, groups);
  END IF;
  PERFORM filao.arrange_all(q, groups, now, later);
END
$$;

-- Remove messages for good, and count them under `counter`.
CREATE OR REPLACE FUNCTION filao.discard(q integer, ids bigint[], counter text, now bigint, later boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  was    record;
  failed bigint[] := ARRAY(SELECT t.id FROM filao.message t WHERE t.id = ANY (ids) AND t.failures > 0);
  gone   bigint;
  groups text[] := filao.groups_of(ids);
  m      record;
BEGIN
  IF counter <> 'acked' THEN  -- of which the consumer is known
    PERFORM filao.note(q, ids, counter, CASE counter WHEN 'dropped' THEN '' ELSE filao.caller() END, NULL, now);
  END IF;
  SELECT * INTO was FROM filao.tally(ids, -1);
  FOR m IN  -- the window of a dead letter's key began when it died
    SELECT CASE WHEN t.state <> 'dead' THEN t.dedup_key END AS dedup_key, t.message_id, filao.name_of(t) AS name
    FROM filao.message t WHERE t.id = ANY (ids) AND (t.dedup_key IS NOT NULL OR t.message_id IS NOT NULL)
  LOOP
    PERFORM filao.start_window(q, m.dedup_key, m.message_id, m.name, now);
  END LOOP;
  IF cardinality(failed) > 0 THEN
    DELETE FROM filao.failure WHERE message = ANY (failed);
    IF EXISTS (SELECT FROM filao.failure WHERE message = ANY (failed)) THEN
      PERFORM filao.skipped('filao.failure');
    END IF;
  END IF;
  DELETE FROM filao.message WHERE id = ANY (ids);
  GET DIAGNOSTICS gone = ROW_COUNT;
  IF gone < cardinality(ids) THEN
    PERFORM filao.skipped('filao.message');
  END IF;
  PERFORM filao.count(q, was.names || counter, was.amounts || gone);
  PERFORM filao.arrange_all(q, groups, now, later);
END
$$;

-- Forget the keys of messages at once; of dead letters not the message_id, which is their name.
CREATE OR REPLACE FUNCTION filao.forget_all_keys(q integer, ids bigint[], names boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  m record;
BEGIN
  FOR m IN
    SELECT t.dedup_key, CASE WHEN names THEN t.message_id END AS message_id, filao.name_of(t) AS name
    FROM filao.message t WHERE t.id = ANY (ids) AND (t.dedup_key IS NOT NULL OR (names AND t.message_id IS NOT NULL))
  LOOP
    PERFORM filao.forget_keys(q, m.dedup_key, m.message_id, m.name);
  END LOOP;
END
$$;

-- Bury messages that outlived their time to live, or drop them if the queue says so. They hold no key any more.
CREATE OR REPLACE FUNCTION filao.expire(q integer, ids bigint[], now bigint, later boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  dropped boolean := (SELECT drops_old FROM filao.queue WHERE id = q);
BEGIN
  PERFORM filao.forget_all_keys(q, ids, dropped);
  IF dropped THEN
    PERFORM filao.discard(q, ids, 'dropped', now, later);
  ELSE
    PERFORM filao.record(
      q, ids, 'expired', array_fill('it outlived its ttl'::text, ARRAY[cardinality(ids)]), NULL, now
    );
    PERFORM filao.die(q, ids, 'expired', now, later);
  END IF;
END
$$;

-- Expire so many messages at most, from a time on, and return how many there were. What somebody else has locked is
-- left to them.
CREATE OR REPLACE FUNCTION filao.expire_some(q integer, most bigint, now bigint, later boolean, since bigint = 0)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  picked bigint[] := filao.pick_expired(q, since, now, most, later);
BEGIN
  IF picked IS NULL THEN
    RETURN 0;
  END IF;
  PERFORM filao.expire(q, picked, now, later);
  RETURN cardinality(picked);
END
$$;

-- Expire what outlived its time to live, so that an operator sees it where it is.
CREATE OR REPLACE FUNCTION filao.expire_all(moment bigint) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now  bigint := filao.now(moment);
  q    integer;
  seen filao.seen;
BEGIN
  FOR q IN SELECT id FROM filao.queue ORDER BY id LOOP
    seen := filao.look(q, filao.seen(q));
    PERFORM filao.expire_some(q, 5000, now, false, seen.expiring);
  END LOOP;
END
$$;

-- Expire the message of this name; false when it has not outlived its time to live, or is a dead letter, which keeps
-- its message_id.
CREATE OR REPLACE FUNCTION filao.expire_named(q integer, name text, now bigint, later boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
  old bigint := filao.number_of(q, name);
BEGIN
  SELECT id INTO old FROM filao.message
  WHERE id = old AND expires_at <= now AND state IN ('ready', 'delayed', 'blocked') FOR UPDATE;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  PERFORM filao.expire(q, ARRAY[old], now, later);
  RETURN true;
END
$$;

-- End leases whose consumers said nothing: the attempts are used. The tokens stay until somebody receives the messages,
-- so that a late ack of work that was done still counts.
CREATE OR REPLACE FUNCTION filao.lose(q integer, ids bigint[], outcome text, now bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  spent   bigint[];
  others  bigint[];
  holders text[];
BEGIN
  SELECT array_agg(m.id) FILTER (WHERE m.attempts >= r.max_attempts),
         array_agg(m.id) FILTER (WHERE m.attempts < r.max_attempts),
         array_agg(h.name ORDER BY array_position(ids, m.id))
  INTO spent, others, holders
  FROM filao.queue r, filao.message m
  LEFT JOIN LATERAL (SELECT name FROM filao.process WHERE id = m.token >> 32) AS h ON true
  WHERE r.id = q AND m.id = ANY (ids);
  PERFORM filao.count(q, ARRAY['lost'], ARRAY[cardinality(ids)]);
  PERFORM filao.record(q, ids, outcome, NULL, holders, now);
  PERFORM filao.die(q, spent, 'max_attempts', now, false) WHERE spent IS NOT NULL;
  PERFORM filao.give_back(q, others, NULL, true, 1, 0, now, false) WHERE others IS NOT NULL;
END
$$;
