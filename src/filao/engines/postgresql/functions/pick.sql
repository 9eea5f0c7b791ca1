-- Looks for so many rows at most, the first in the order of an index, which lock what they find until the transaction
-- ends. What somebody else has locked, or the group of, is left to them, and takes no place among what is found.
--
-- So groups are locked as rows are come upon, in the WHERE. That is right only if nothing is sorted: a sort would come
-- upon all rows first, and lock all their groups. Hence `enable_sort`, as the limit is not known when the plan is made;
-- and each look is a function of its own, so that it holds for nothing else.

-- The first ready messages of a priority, as where they are stored.
CREATE OR REPLACE FUNCTION filao.pick_ready(q integer, p integer, floor bigint, now bigint, most bigint) RETURNS tid[]
LANGUAGE plpgsql SET enable_sort = off AS $$
BEGIN
  RETURN ARRAY(
    SELECT m.ctid FROM filao.message m
    WHERE m.queue = q AND m.state = 'ready' AND -m.priority <= -p AND (-m.priority, m.id) >= (-p, floor)
      AND (m.expires_at IS NULL OR m.expires_at > now)  -- `make_due` leaves some when there are very many
      AND (m.grp IS NULL OR pg_try_advisory_xact_lock(filao.group_key(q, m.grp)))
    ORDER BY -m.priority, m.id LIMIT most FOR UPDATE SKIP LOCKED
  );
END
$$;

-- The delayed messages that have been due longest, as their ids; NULL when there is none.
CREATE OR REPLACE FUNCTION filao.pick_due(q integer, since bigint, now bigint, most bigint) RETURNS bigint[]
LANGUAGE plpgsql SET enable_sort = off AS $$
BEGIN
  RETURN (
    SELECT array_agg(due.id)
    FROM (
      SELECT m.id FROM filao.message m
      WHERE m.queue = q AND m.state = 'delayed' AND m.at >= since AND m.at <= now
        AND (m.grp IS NULL OR pg_try_advisory_xact_lock(filao.group_key(q, m.grp)))
      ORDER BY m.at LIMIT most FOR UPDATE SKIP LOCKED
    ) AS due
  );
END
$$;

-- The messages whose leases ran out first, as their ids, and when the first of them expires; NULL when there is none.
CREATE OR REPLACE FUNCTION filao.pick_lapsed(
  q integer, since bigint, now bigint, most bigint, OUT ids bigint[], OUT expires_at bigint
)
LANGUAGE plpgsql SET enable_sort = off AS $$
BEGIN
  SELECT array_agg(lapsed.id), min(lapsed.expires_at) INTO ids, expires_at
  FROM (
    SELECT m.id, m.expires_at FROM filao.message m
    WHERE m.queue = q AND m.state = 'leased' AND m.at >= since AND m.at <= now
      AND (m.grp IS NULL OR pg_try_advisory_xact_lock(filao.group_key(q, m.grp)))
    ORDER BY m.at LIMIT most FOR UPDATE SKIP LOCKED
  ) AS lapsed;
END
$$;

-- The messages that outlived their time to live first, as their ids; NULL when there is none. Who arranges the groups
-- `later` needs no lock of them.
CREATE OR REPLACE FUNCTION filao.pick_expired(q integer, since bigint, now bigint, most bigint, later boolean)
RETURNS bigint[] LANGUAGE plpgsql SET enable_sort = off AS $$
BEGIN
  RETURN (
    SELECT array_agg(old.id)
    FROM (
      SELECT m.id FROM filao.message m
      WHERE m.queue = q AND m.state IN ('ready', 'delayed', 'blocked')
        AND m.expires_at >= since AND m.expires_at <= now
        AND (later OR m.grp IS NULL OR pg_try_advisory_xact_lock(filao.group_key(q, m.grp)))
      ORDER BY m.expires_at LIMIT most FOR UPDATE SKIP LOCKED
    ) AS old
  );
END
$$;

-- The oldest notes of groups to be arranged, as where they are stored; those groups, and the lowest id that was sent to
-- them; NULL when there is none.
CREATE OR REPLACE FUNCTION filao.pick_noted(
  q integer, since xid8, most bigint, OUT notes tid[], OUT groups text[], OUT lowest bigint
)
LANGUAGE plpgsql SET enable_sort = off AS $$
BEGIN
  SELECT array_agg(note.ctid), array_agg(DISTINCT note.grp), min(note.lowest) INTO notes, groups, lowest
  FROM (
    SELECT u.ctid, u.grp, u.lowest FROM filao.unarranged u
    WHERE u.queue = q AND u.noted_in >= since AND pg_try_advisory_xact_lock(filao.group_key(q, u.grp))
    ORDER BY u.noted_in LIMIT most FOR UPDATE SKIP LOCKED
  ) AS note;
END
$$;
