"""What a database consists of, as its catalog tells it: two databases are built alike if these are equal."""

from __future__ import annotations

import re
from typing import Any

import psycopg
from psycopg import sql

_OURS = """
  select oid from pg_namespace
   where nspname !~ '^pg_' and nspname not in ('information_schema', 'supabase_migrations')
"""

_FREE = "not exists (select from pg_depend x where x.objid = {} and x.deptype = 'e')"

_QUERIES = {
    "schemas": f"select nspname, {{owner:nspowner}}, {{acl:nspacl}} from pg_namespace where oid in ({_OURS})",
    "extensions": "select extname, extnamespace::regnamespace::text from pg_extension",
    "relations": f"""
        select oid::regclass::text, relkind::text, {{owner:relowner}}, {{acl:relacl}}, relpersistence::text, reloptions,
               relrowsecurity, relforcerowsecurity, relreplident::text, pg_get_partkeydef(oid),
               pg_get_expr(relpartbound, oid), coalesce(pg_get_viewdef(oid), '')
          from pg_class where relnamespace in ({_OURS}) and relkind in ('r', 'p', 'v', 'm', 'S', 'f') and {{free:oid}}
    """,
    "columns": f"""
        select a.attrelid::regclass::text, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
               a.attidentity::text, a.attgenerated::text, a.attstorage::text, a.attcompression::text,
               a.attcollation::regcollation::text, {{acl:a.attacl}}, pg_get_expr(d.adbin, d.adrelid)
          from pg_attribute a join pg_class c on c.oid = a.attrelid
          left join pg_attrdef d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
         where c.relnamespace in ({_OURS}) and c.relkind in ('r', 'p', 'v', 'm', 'c', 'f') and a.attnum > 0
           and not a.attisdropped and {{free:c.oid}}
    """,
    "types": f"""
        select t.oid::regtype::text, t.typtype::text, {{owner:t.typowner}}, {{acl:t.typacl}}, t.typnotnull,
               t.typdefault,
               array(select e.enumlabel::text from pg_enum e where e.enumtypid = t.oid order by e.enumsortorder)
          from pg_type t where t.typnamespace in ({_OURS}) and t.typtype in ('e', 'd', 'c') and {{free:t.oid}}
           and (t.typrelid = 0 or exists (select from pg_class c where c.oid = t.typrelid and c.relkind = 'c'))
    """,
    "constraints": f"""
        select conrelid::regclass::text, contypid::regtype::text, conname, convalidated, pg_get_constraintdef(oid)
          from pg_constraint where connamespace in ({_OURS}) and {{free:oid}}
    """,
    "indexes": f"""
        select i.indexrelid::regclass::text, i.indisunique, i.indisprimary, i.indisvalid, c.reloptions,
               pg_get_indexdef(i.indexrelid)
          from pg_index i join pg_class c on c.oid = i.indexrelid
         where c.relnamespace in ({_OURS})
    """,
    "functions": f"""
        select oid::regprocedure::text, {{owner:proowner}}, {{acl:proacl}}, pg_get_functiondef(oid)
          from pg_proc where pronamespace in ({_OURS}) and prokind in ('f', 'p') and {{free:oid}}
    """,
    "policies": f"""
        select polrelid::regclass::text, polname, polcmd::text, polpermissive,
               array(select r::regrole::text from unnest(polroles) as r order by 1),
               pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)
          from pg_policy join pg_class c on c.oid = polrelid where c.relnamespace in ({_OURS})
    """,
    "triggers": f"""
        select tgrelid::regclass::text, tgname, tgenabled::text, pg_get_triggerdef(pg_trigger.oid)
          from pg_trigger join pg_class c on c.oid = tgrelid
         where c.relnamespace in ({_OURS}) and not tgisinternal
    """,
    "rules": "select tablename::text, rulename::text, definition from pg_rules where schemaname = 'upload_pipeline'",
    "statistics": f"select stxname, pg_get_statisticsobjdef(oid) from pg_statistic_ext where stxnamespace in ({_OURS})",
    "default rights": """
        select {owner:defaclrole}, defaclnamespace::regnamespace::text, defaclobjtype::text, {acl:defaclacl}
          from pg_default_acl
    """,
    "comments": f"""
        select classoid::regclass::text, pg_describe_object(classoid, objoid, objsubid), description
          from pg_description
         where (classoid = 'pg_class'::regclass
                and objoid in (select oid from pg_class where relnamespace in ({_OURS}) and {{free:pg_class.oid}}))
            or (classoid = 'pg_proc'::regclass
                and objoid in (select oid from pg_proc where pronamespace in ({_OURS}) and {{free:pg_proc.oid}}))
            or (classoid = 'pg_namespace'::regclass and objoid in ({_OURS}))
    """,
}


def catalog(connection: psycopg.Connection[Any]) -> dict[str, list[str]]:
    """Each kind of object of a database with its full definition, and the rows that the schema itself puts in.

    Left out are the system's schemas, the ledger of migrations, what extensions own, and times.
    """
    connection.execute("set search_path = ''")
    found = {kind: _lines(connection, _expand(query)) for kind, query in _QUERIES.items()}
    found["rows"] = [
        f"{schema}.{table}: {line}"
        for schema, table in _tables(connection)
        for line in _rows(connection, schema, table)
    ]
    return found


def _lines(connection: psycopg.Connection[Any], query: str) -> list[str]:
    return sorted(str(row) for row in connection.execute(query.encode()))


def _expand(query: str) -> str:
    query = re.sub(r"\{owner:([\w.]+)\}", r"pg_get_userbyid(\1)::text", query)
    query = re.sub(r"\{acl:([\w.]+)\}", r"array(select i::text from unnest(\1) as i order by 1)", query)
    return re.sub(r"\{free:([\w.]+)\}", lambda match: _FREE.format(match[1]), query)


def _tables(connection: psycopg.Connection[Any]) -> list[tuple[str, str]]:
    return connection.execute(
        "select schemaname::text, tablename::text from pg_tables where schemaname = 'upload_pipeline' order by 1, 2"
    ).fetchall()


def _rows(connection: psycopg.Connection[Any], schema: str, table: str) -> list[str]:
    name = sql.Identifier(schema, table)
    columns = connection.execute(
        """
        select attname::text from pg_attribute
         where attrelid = %s::regclass and attnum > 0 and not attisdropped and atttypid <> 'timestamptz'::regtype
         order by attname
        """,
        [name.as_string(connection)],
    ).fetchall()
    rows = connection.execute(
        sql.SQL("select {} from {}").format(sql.SQL(", ").join(sql.Identifier(column) for (column,) in columns), name)
    )
    return sorted(str(row) for row in rows)
