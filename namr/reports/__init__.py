"""What people are shown of a release: the sections of its page, and tables that they can work with.

`grids` shows queries with what is found for them; `frontier`, `lists` and `costs` say what a search takes and
why; `self_search` lets images ask their own gallery, and `duplicates` and `suspects` say what came of it;
`structure_section` says what the structure embedding does. `beside` puts it all together.
"""
