-- What a session has seen of a queue, so that it need not see it again.
--
-- While anybody's old transaction is open no dead row can be removed, and a scan for the first ready message walks over
-- all that were handled since. So a session remembers where what it saw begins, its floors, and scans from there. What
-- comes to wait below a floor afterwards does so in a transaction whose end the session had not seen; each message
-- tells in which transaction it came to wait (`moved_in`), and an index finds those that are news to a snapshot.
--
-- The invariant: below its floors a session would find no message that waits, but those moved by transactions that ran
-- at its `snapshot` or began later, or by `own`, in which it looked. A message that somebody's claim has locked is seen
-- as ready, so that a claim that is rolled back leaves no hole.
--
-- What was seen is a setting of the session: it is rolled back with the transaction and ends with the session. A pooler
-- may hand it to another client, for it is true of the database. A session without it begins at the bottom.

-- The name of a setting in which a session remembers something of a table's rows. It names the table's file too: a
-- table that was restored, emptied or made anew holds rows that came there in transactions of another time.
CREATE OR REPLACE FUNCTION filao.setting(what text, q integer, held regclass) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
  RETURN format('filao.%s_%s_%s', what, q, pg_relation_filenode(held));
END
$$;

-- Nothing: the floors are the bottom.
CREATE OR REPLACE FUNCTION filao.nothing_seen() RETURNS filao.seen LANGUAGE sql VOLATILE AS $$
  SELECT ROW (
    pg_current_snapshot(), pg_current_xact_id_if_assigned(), '{}', '{}', 2147483647, 0, 0, 0, 0, 0, '0'
  )::filao.seen
$$;

-- What this session has seen of a queue.
CREATE OR REPLACE FUNCTION filao.seen(q integer) RETURNS filao.seen LANGUAGE sql VOLATILE AS $$
  SELECT coalesce(nullif(current_setting(filao.setting('seen', q, 'filao.message'), true), '')::filao.seen,
                  filao.nothing_seen())
$$;

-- What a lease of so many milliseconds tells of its transaction: nothing, unless it may end before that does, and so
-- before a session looked that did not see it. A transaction that receives takes no longer than 30 s, or a statement is
-- ended.
CREATE OR REPLACE FUNCTION filao.news_of(lease bigint) RETURNS xid8 LANGUAGE sql VOLATILE AS $$
  SELECT CASE WHEN lease < 30000 THEN pg_current_xact_id() END
$$;

-- Lower the floors to what has moved since the session looked; after too much of it, to the bottom.
CREATE OR REPLACE FUNCTION filao.look(q integer, seen filao.seen) RETURNS filao.seen LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  most    CONSTANT integer := 20000;  -- news, which take some 10 ms
  fresh   filao.seen := filao.nothing_seen();  -- its snapshot comes before what is read below
  since   xid8 := pg_snapshot_xmax(seen.snapshot);
  -- what lies beyond was restored here, and moved in another cluster
  upto    xid8 := greatest(pg_snapshot_xmax(fresh.snapshot), fresh.own);
  running xid8[] := ARRAY(SELECT pg_snapshot_xip(seen.snapshot)) || seen.own;
  found   bigint := 0;
  news    record;
  i       integer;
BEGIN
  FOR news IN
    SELECT state, priority, min(id) AS id, min(at) AS at, min(expires_at) AS expires_at, count(*) AS count
    FROM (
      SELECT state, priority, id, at, expires_at FROM filao.message
      WHERE queue = q AND moved_in >= since AND moved_in <= upto
      UNION ALL
      SELECT late.* FROM unnest(running) AS ran (number), LATERAL (
        SELECT state, priority, id, at, expires_at FROM filao.message WHERE queue = q AND moved_in = ran.number
        OFFSET 0  -- so that each is looked up, not the whole queue filtered
      ) AS late
      LIMIT most
    ) AS m
    GROUP BY state, priority
  LOOP
    found := found + news.count;
    seen.expiring := least(seen.expiring, news.expires_at);
    IF news.state = 'delayed' THEN
      seen.delayed := least(seen.delayed, news.at);
    ELSIF news.state = 'blocked' THEN
      seen.blocked := least(seen.blocked, news.id);
    ELSIF news.state = 'leased' THEN
      seen.leased := least(seen.leased, news.at);
    ELSIF news.state = 'ready' AND (seen.below IS NULL OR news.priority >= seen.below) THEN
      i := array_position(seen.priorities, news.priority);
      IF i IS NULL THEN
        i := 1 + (SELECT count(*) FROM unnest(seen.priorities) AS p WHERE p > news.priority);
        seen.priorities := seen.priorities[:i - 1] || news.priority || seen.priorities[i:];
        seen.floors := seen.floors[:i - 1] || news.id || seen.floors[i:];
      ELSE
        seen.floors[i] := least(seen.floors[i], news.id);
      END IF;
    END IF;
  END LOOP;
  IF found = most THEN
    RETURN fresh;
  END IF;
  seen.noted := least(seen.noted, (
    SELECT n.noted_in
    FROM (
      (SELECT noted_in FROM filao.unarranged
       WHERE queue = q AND noted_in >= since AND noted_in <= upto ORDER BY noted_in LIMIT 1)
      UNION ALL
      SELECT late.* FROM unnest(running) AS ran (number), LATERAL (
        SELECT noted_in FROM filao.unarranged WHERE queue = q AND noted_in = ran.number LIMIT 1
      ) AS late
    ) AS n
    ORDER BY 1 LIMIT 1
  ));
  IF cardinality(seen.priorities) > 64 THEN  -- the lower ones are learned again when their turn comes
    seen.below := seen.priorities[32];
    seen.priorities := seen.priorities[:32];
    seen.floors := seen.floors[:32];
  END IF;
  seen.snapshot := fresh.snapshot;
  seen.own := fresh.own;
  RETURN seen;
END
$$;

-- Learn the first message of each of the next priorities below those that were seen.
CREATE OR REPLACE FUNCTION filao.learn(q integer, seen filao.seen) RETURNS filao.seen LANGUAGE plpgsql AS $$
DECLARE
  most CONSTANT integer := 32;
  priorities integer[];
  floors     bigint[];
BEGIN
  WITH RECURSIVE heads AS (
    (SELECT m.priority, m.id FROM filao.message m
     WHERE m.queue = q AND m.state = 'ready' AND -m.priority > -seen.below ORDER BY -m.priority, m.id LIMIT 1)
    UNION ALL
    SELECT next.* FROM heads, LATERAL (
      SELECT m.priority, m.id FROM filao.message m
      WHERE m.queue = q AND m.state = 'ready' AND -m.priority > -heads.priority ORDER BY -m.priority, m.id LIMIT 1
    ) AS next
  )
  SELECT coalesce(array_agg(h.priority), '{}'), coalesce(array_agg(h.id), '{}') INTO priorities, floors
  FROM (SELECT * FROM heads LIMIT most) AS h;
  seen.priorities := seen.priorities || priorities;
  seen.floors := seen.floors || floors;
  seen.below := CASE WHEN cardinality(priorities) = most THEN priorities[most] END;
  RETURN seen;
END
$$;

-- The first place of a priority, at its floor or above, at which a ready message is seen; NULL when there is none.
CREATE OR REPLACE FUNCTION filao.first_ready(q integer, p integer, floor bigint) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
  RETURN (
    SELECT m.id FROM filao.message m
    WHERE m.queue = q AND m.state = 'ready' AND -m.priority <= -p AND (-m.priority, m.id) >= (-p, floor)
    ORDER BY -m.priority, m.id LIMIT 1
  );
END
$$;

-- Raise the floors of all priorities, or of some, to the first message of each that is seen.
CREATE OR REPLACE FUNCTION filao.look_at_ready(q integer, seen filao.seen, most integer = 2147483647)
RETURNS filao.seen LANGUAGE plpgsql AS $$
BEGIN
  WHILE seen.below IS NOT NULL AND cardinality(seen.priorities) < most LOOP
    seen := filao.learn(q, seen);
  END LOOP;
  SELECT coalesce(array_agg(s.priority ORDER BY s.priority DESC), '{}'),
         coalesce(array_agg(s.place ORDER BY s.priority DESC), '{}')
  INTO seen.priorities, seen.floors
  FROM (SELECT p.priority, filao.first_ready(q, p.priority, p.floor) AS place
        FROM unnest(seen.priorities, seen.floors) AS p (priority, floor)) AS s
  WHERE s.place IS NOT NULL;
  RETURN seen;
END
$$;

-- Raise the floors in time to the first that is seen: where that may be due, or always with `ahead`; and that of noted
-- groups. Leases that others took since end later than the last look, or are news. Where the clock was set back since,
-- they may end at any time.
CREATE OR REPLACE FUNCTION filao.look_at_times(q integer, seen filao.seen, now bigint, ahead boolean = false)
RETURNS filao.seen LANGUAGE plpgsql AS $$
DECLARE
  lapsed bigint := (
    SELECT at FROM filao.message
    WHERE queue = q AND state = 'leased' AND at <= now
      AND at >= CASE WHEN now < seen.looked_at THEN 0 ELSE least(seen.leased, seen.looked_at) END
    ORDER BY at LIMIT 1
  );
BEGIN
  IF lapsed IS NOT NULL THEN
    seen.leased := lapsed;
  ELSIF ahead THEN
    seen.leased := (SELECT at FROM filao.message
                    WHERE queue = q AND state = 'leased' AND at >= seen.leased AND at > now ORDER BY at LIMIT 1);
  ELSIF seen.leased <= now THEN  -- nobody asks for the first: what ended between here and there would be walked over
    seen.leased := now + 1;
  END IF;
  IF ahead OR seen.delayed <= now THEN
    seen.delayed := (SELECT at FROM filao.message
                     WHERE queue = q AND state = 'delayed' AND at >= seen.delayed ORDER BY at LIMIT 1);
  END IF;
  IF seen.expiring <= now THEN
    seen.expiring := (
      SELECT expires_at FROM filao.message
      WHERE queue = q AND expires_at >= seen.expiring AND state IN ('ready', 'delayed', 'blocked')
      ORDER BY expires_at LIMIT 1
    );
  END IF;
  IF seen.noted IS NOT NULL THEN
    seen.noted := (SELECT noted_in FROM filao.unarranged
                   WHERE queue = q AND noted_in >= seen.noted ORDER BY noted_in LIMIT 1);
  END IF;
  seen.looked_at := now;
  RETURN seen;
END
$$;

-- Remember what was seen.
CREATE OR REPLACE FUNCTION filao.remember_seen(q integer, seen filao.seen) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM set_config(filao.setting('seen', q, 'filao.message'), seen::text, false);
END
$$;
