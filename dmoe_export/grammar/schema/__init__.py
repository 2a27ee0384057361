"""JSON schemas as regular expressions; `regex_of_schema` is all that others use. Imports errors alone."""

from .writing import regex_of_schema as regex_of_schema
