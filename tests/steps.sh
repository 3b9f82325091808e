# To be sourced. `step TEXT COMMAND...` prints the text, runs the command, and prints its time.
doing="" began=0

took() {
  echo "$(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
}

step() {
  doing=$1 began=$SECONDS
  shift
  echo "== $doing ..." >&2
  "$@"
  echo "== done in $(took)" >&2
  doing=""
}

trap '[ -z "$doing" ] || echo "== stopped after $(took): $doing" >&2' EXIT
