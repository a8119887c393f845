"""The code location. Importing it reads settings and loads no model library; a test holds that."""

from dagster_project.build import build_defs

defs = build_defs()
