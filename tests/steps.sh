# To be sourced. `step TEXT COMMAND...` prints the text, runs the command and prints its time. At the
# end it prints the times of all steps again.
doing="" began=0 report=""

took() {
  printf '%d min %02d s' $(((SECONDS - $1) / 60)) $(((SECONDS - $1) % 60))
}

step() {
  doing=$1 began=$SECONDS
  shift
  echo "== $doing ..." >&2
  "$@"
  report+="$(took "$began")  $doing"$'\n'
  echo "== done in $(took "$began")" >&2
  doing=""
}

finish() {
  [ -z "$doing" ] || report+="$(took "$began")  $doing: stopped"$'\n'
  [ -z "$report" ] || printf '\n%s%s  in all\n' "$report" "$(took 0)" >&2
}

trap finish EXIT
