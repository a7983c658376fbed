#!/bin/sh
# In place of PRRTE's ssh: says what it would run on another host.
shift
echo "PRTE_LAUNCH: $*"
