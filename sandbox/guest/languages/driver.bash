# Bash that keeps its variables, directory and functions from one piece of code to the next: see __init__.py.
# Its own names begin with __warmcell, and what code starts has none of its descriptors.
if [ -z "${__warmcell_flags+set}" ]; then
  exec 198<&"$1" 199>&"$2"
  eval "exec $1<&- $2>&-"
  set --
  __warmcell_flags=
  __warmcell_status=0
fi

# One text of a request into __warmcell_text. Lengths are in bytes.
__warmcell_read() {
  builtin local LC_ALL=C __warmcell_length
  IFS= builtin read -r -u 198 __warmcell_length || builtin return 1
  __warmcell_text=
  [ "$__warmcell_length" = 0 ] || IFS= builtin read -r -N "$__warmcell_length" -u 198 __warmcell_text
}

__warmcell_tell() {
  builtin local LC_ALL=C __warmcell_text
  builtin printf '%d\n' "$#" >&199
  for __warmcell_text; do builtin printf '%d\n%s' "${#__warmcell_text}" "$__warmcell_text" >&199; done
}

__warmcell_ask() {
  builtin local __warmcell_count __warmcell_name
  IFS= builtin read -r -u 198 __warmcell_count || builtin exit 0
  __warmcell_read || builtin exit 0
  __warmcell_code=$__warmcell_text
  while ((--__warmcell_count > 0)); do
    __warmcell_read || builtin exit 0
    __warmcell_name=${__warmcell_text%%=*}
    if [[ ! $__warmcell_name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]]; then
      builtin continue
    elif [[ $__warmcell_text == *=* ]]; then
      builtin export "$__warmcell_text"
    else
      builtin unset "$__warmcell_name"
    fi
  done
}

# How a piece of code has ended. `break` and `continue` outside of a loop of its own have left one of those around it here.
__warmcell_answer() {
  if [ "$__warmcell_status" = left ]; then
    { __warmcell_flags=${-//[!aefuvxC]/}; builtin set +aefuvxC; } 2>/dev/null
    builtin printf '%s\n' 'bash: break and continue mean something in a loop only; what followed is left out' >&2
    __warmcell_status=1
  fi
  if [ "$__warmcell_status" = 0 ]; then
    __warmcell_tell ok
  else
    __warmcell_tell error NonZeroExit "exit status $__warmcell_status" ''
  fi
}

builtin trap : INT # What runs is interrupted by it, and this goes on.
while builtin :; do
  if [ "$__warmcell_status" = left ]; then __warmcell_answer; fi
  __warmcell_ask
  __warmcell_status=left
  for __warmcell_once in once; do
    if [ -n "$__warmcell_flags" ]; then builtin set "-$__warmcell_flags"; fi
    builtin eval "$__warmcell_code" 198<&- 199>&-
    { __warmcell_status=$?; __warmcell_flags=${-//[!aefuvxC]/}; builtin set +aefuvxC; } 2>/dev/null
  done
  __warmcell_answer
done
builtin source "${BASH_SOURCE[0]}" # `break 2` leads here.
