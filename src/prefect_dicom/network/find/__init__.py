"""C-FIND, PS3.4 C.4.1: studies by their keys, and the PACS's own lists of what is in them.

Queries are hierarchical, with one value for every unique key: the form that every PACS
answers. Lists of UIDs, which many answer and which save most of the queries, are tried first
where the answer itself shows whether it is whole.

``query`` is one query and its end, ``answers`` reads the values of an answer, ``list_*`` are
named by what they list. ``query_capabilities`` is what a node makes of queries below the STUDY
level, ``list_completeness`` checks whether a list ends before its end.
"""
