-- Who may call what. The doors are the functions that Filao calls from outside, and what an operator's role is granted.
--
-- Each runs with the rights of the owner of the tables, so that a role which may call filao.send can do that and
-- nothing else to the tables; and with a search path in which nobody else can put an operator, a function or a type of
-- the same name. What stands behind them is called with theirs. See SECURITY.md for the grants that make a sender, a
-- receiver or an operator.

DO $$
DECLARE
  owner regrole := (SELECT relowner FROM pg_class WHERE oid = 'filao.meta'::regclass);
  f     record;
  r     regrole;
BEGIN
  FOR f IN
    SELECT oid::regprocedure AS name, proname, proowner FROM pg_proc WHERE pronamespace = 'filao'::regnamespace
  LOOP
    IF f.proowner <> owner THEN
      EXECUTE format('ALTER FUNCTION %s OWNER TO %s', f.name, owner);
    END IF;
    EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', f.name);
    IF f.proname IN (
      'ages', 'amend', 'arrange', 'arrange_noted', 'begin_deed', 'call', 'clock', 'declare', 'delete', 'even_clock',
      'expire_all', 'extend', 'halt_group', 'lock_groups', 'make_all_due', 'mark', 'name_of', 'note_jump', 'number_of',
      'of_group', 'receive', 'record_deed', 'redrive', 'remove', 'resume_group', 'send', 'settle', 'skipped',
      'split', 'strike_off', 'tidy', 'watch', 'why_held'
    ) THEN
      EXECUTE format('ALTER FUNCTION %s SECURITY DEFINER SET search_path = pg_catalog, pg_temp', f.name);
    END IF;
  END LOOP;
  FOR r IN  -- a role that may write the messages themselves may call everything
    SELECT DISTINCT a.grantee FROM pg_class c, aclexplode(c.relacl) AS a
    WHERE c.oid = 'filao.message'::regclass AND a.privilege_type = 'INSERT' AND a.grantee NOT IN (0, owner)
  LOOP
    EXECUTE format('GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA filao TO %s', r);
  END LOOP;
END
$$;
