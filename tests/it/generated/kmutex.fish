
# Completes with the keys that are held or waited for, where a KEY is expected.
complete -c kmutex -n "__fish_kmutex_using_subcommand run lock unlock status break" -f -a "(kmutex status --keys 2>/dev/null)"
complete -c kmutex -n "__fish_kmutex_using_subcommand run" -s k -l key -x -a "(kmutex status --keys 2>/dev/null)"
