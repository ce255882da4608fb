
# Completes with the keys that are held or waited for, where a KEY is expected.
_kmutex_with_keys() {
    _kmutex "$@"
    local current="${COMP_WORDS[COMP_CWORD]}" word=$COMP_CWORD line="${COMP_LINE:0:COMP_POINT}" index
    # Bash divides a word at characters like = and :, and replaces only the last part, "$2".
    while [[ word -gt 2 && -n "$line" && "$line" == *"${COMP_WORDS[word-1]}$current" ]]; do
        word=$((word - 1)) current="${COMP_WORDS[word]}$current"
    done
    local kept="${current%"$2"}"
    local previous="${COMP_WORDS[word-1]}"
    case "${COMP_WORDS[1]}" in
        run|lock|unlock|status|break|forget) ;;
        *) return ;;
    esac
    [[ word -lt 2 || "$current" == -* ]] && return
    if [[ "$previous" != -k && "$previous" != --key ]]; then
        # Only the first word that is neither an option nor, as far as one can see, the value of one.
        for ((index = 2; index < word; index++)); do
            [[ "${COMP_WORDS[index]}" == -* || "${COMP_WORDS[index-1]}" == -* ]] || return
        done
    fi
    # Not compgen -W, which expands its words: a key may read like a command substitution. For the same reason the key is
    # quoted on the command line.
    local key quoted
    while IFS= read -r key; do
        printf -v quoted %q "$key"
        [[ "$key" == "$current"* || "$quoted" == "$current"* ]] && COMPREPLY+=("${quoted#"$kept"}")
    done < <(kmutex status --keys 2>/dev/null)
}
complete -F _kmutex_with_keys -o bashdefault -o default kmutex
