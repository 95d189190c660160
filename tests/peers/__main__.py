"""`python -m tests.peers` runs every cell and writes the tables of docs/integrations.md."""

from tests.peers.table import write

write()
