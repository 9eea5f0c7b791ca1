// The timeline: one lane for each worker, a bar for each lease, with ticks where it was extended and a mark for how it ended.

const LANE = 24; // pixels
const LEFT = 92; // for the names
const MARKS = { acked: "✓", nacked: "↩", failed: "↩", released: "◦", refused: "⊘", killed: "✖", settled: "•" };

export default {
  props: { initial: Object, words: Object },
  emits: ["live"],
  data() {
    return { scene: this.initial, width: 800 };
  },
  template: `
    <section class="timeline" :aria-label="words.timeline">
      <div class="legend">
        <h3>{{ words.timeline }}</h3>
        <span v-for="how in ['acked', 'nacked', 'killed', 'refused']" :key="how"><b aria-hidden="true">{{ marks[how] }}</b> {{ words['how_' + how] }}</span>
        <span><b aria-hidden="true">¦</b> {{ words.extended }}</span>
        <span><b aria-hidden="true">◆</b> {{ words.paid }}</span>
        <button type="button" v-if="!scene.live" @click="$emit('live')">{{ words.back_to_now }}</button>
      </div>
      <svg :viewBox="'0 0 ' + width + ' ' + height" :height="height" width="100%" role="img" :aria-label="summary" ref="svg">
        <g v-for="second in seconds" :key="second">
          <line :x1="x(second)" :x2="x(second)" y1="0" :y2="height - 14" class="grid" />
          <text :x="x(second)" :y="height - 2" class="tick" text-anchor="middle">{{ second }} s</text>
        </g>
        <g v-for="(lane, row) in scene.lanes" :key="lane.number">
          <text x="0" :y="row * 24 + 17" class="name" :class="lane.state">{{ name(lane) }}</text>
          <g v-for="bar in lane.bars" :key="bar.id + bar.attempt" :class="{ focus: bar.focus }">
            <title>{{ told(lane, bar) }}</title>
            <rect :x="x(bar.began)" :y="row * 24 + 4" :width="Math.max(2, x(end(bar)) - x(bar.began))" height="16" rx="3"
              :class="['bar', 'policy-' + bar.colour, bar.how || 'open', { sleeps: lane.state === 'paused' && bar.ended === null }]" />
            <line v-for="tick in bar.ticks" :key="tick" :x1="x(tick)" :x2="x(tick)" :y1="row * 24 + 4" :y2="row * 24 + 20" class="extension" />
            <text v-if="x(end(bar)) - x(bar.began) > 46" :x="Math.max(x(bar.began), left) + 4" :y="row * 24 + 16" class="number">{{ bar.number }}{{ bar.attempt > 1 ? ' (' + bar.attempt + ')' : '' }}</text>
            <text v-if="bar.how" :x="x(bar.ended) - 1" :y="row * 24 + 16" text-anchor="end" class="mark" :class="bar.how">{{ marks[bar.how] }}</text>
            <text v-if="bar.paid !== null" :x="x(bar.paid)" :y="row * 24 + 15" text-anchor="middle" class="paid">◆</text>
          </g>
        </g>
      </svg>
    </section>`,
  computed: {
    marks: () => MARKS,
    left: () => LEFT,
    height() {
      return Math.max(2, this.scene.lanes.length) * LANE + 16;
    },
    seconds() {
      const found = [];
      for (let at = Math.ceil(Math.max(0, this.scene.start) / 10) * 10; at <= this.scene.end; at += 10) found.push(at);
      return found;
    },
    summary() {
      const lanes = this.scene.lanes.map((lane) => {
        const bars = lane.bars.slice(-3).map((bar) => this.told(lane, bar));
        return `${this.name(lane)}: ${bars.join("; ") || "–"}`;
      });
      return `${this.words.timeline}. ${lanes.join(". ")}`;
    },
  },
  methods: {
    show(scene) {
      this.scene = scene;
    },
    x(at) {
      const { start, end } = this.scene;
      const share = (Math.max(at, start) - start) / (end - start);
      return LEFT + Math.min(1, share) * (this.width - LEFT - 8);
    },
    end(bar) {
      return bar.ended === null ? this.scene.now : bar.ended;
    },
    name(lane) {
      const mark = { killed: " ✖", crashed: " ✖", gone: " ◦", paused: " ❚❚" }[lane.state] || "";
      return (lane.guest ? this.words.guest : `${this.words.worker} ${lane.number}`) + mark;
    },
    told(lane, bar) {
      const how = bar.how ? this.words["how_" + bar.how] : this.words.state_working;
      const seconds = (this.end(bar) - bar.began).toFixed(1);
      return `${this.words.claim} ${bar.claim}, ${this.words.attempt} ${bar.attempt}, ${seconds} s, ${how}`;
    },
    measure() {
      if (this.$refs.svg) this.width = Math.max(320, this.$refs.svg.clientWidth);
    },
  },
  mounted() {
    this.observer = new ResizeObserver(() => this.measure());
    this.observer.observe(this.$el);
    this.measure();
  },
  unmounted() {
    this.observer.disconnect();
  },
};
