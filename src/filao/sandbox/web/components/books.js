// The books: the invariants, one line that must always hold, and the ledger of what happened in the business database.

export default {
  props: { initial: Object, words: Object, whole: Boolean },
  emits: ["follow"],
  data() {
    return { scene: this.initial };
  },
  template: `
    <section v-if="!whole" class="sums" :aria-label="words.invariants">
      <template v-if="scene.sums">
        <span class="sum"><b>{{ scene.sums.sent }}</b> {{ words.sent }} =
          <b>{{ scene.sums.ready }}</b> {{ words.ready }} + <b>{{ scene.sums.delayed }}</b> {{ words.delayed }} +
          <b>{{ scene.sums.leased }}</b> {{ words.leased }} + <b>{{ scene.sums.acked }}</b> {{ words.acked }} +
          <b>{{ scene.sums.dead }}</b> {{ words.dead }}<template v-if="scene.sums.removed"> +
          <b>{{ scene.sums.removed }}</b> {{ words.removed }}</template>
          <span class="verdict" :class="scene.sums.holds ? 'good' : 'bad'">{{ scene.sums.holds ? '✓' : '≠' }}</span></span>
        <span class="verdict" :class="scene.unexplained ? 'bad' : scene.lost ? 'warn' : 'good'">{{ scene.lost ? '!' : '✓' }} {{ words.lost }} = {{ scene.lost }}</span>
        <span class="verdict" :class="scene.doubled ? 'warn' : 'good'">{{ scene.doubled ? '!' : '✓' }} {{ words.doubled }} = {{ scene.doubled }}</span>
        <button v-for="wrong in lastOfEach" :key="wrong.kind + wrong.message" type="button" class="cause" @click="$emit('follow', wrong)">{{ cause(wrong) }}</button>
      </template>
      <span v-else class="quiet">{{ words.no_queue }}</span>
    </section>
    <div v-else class="ledger">
      <p><b>{{ scene.sent }}</b> {{ words.confirmed }}, <b>{{ scene.paid }}</b> {{ words.of_them_paid }}{{ words.colon }}
        <b>{{ scene.payments }}</b> {{ words.payments }}, {{ euros(scene.cents) }}</p>
      <ul v-if="scene.wrongs.length">
        <li v-for="wrong in scene.wrongs" :key="wrong.kind + wrong.message">
          <button type="button" class="cause" @click="$emit('follow', wrong)">{{ cause(wrong) }}</button>
        </li>
      </ul>
      <table>
        <thead><tr><th scope="col">{{ words.claim }}</th><th scope="col">{{ words.amount }}</th><th scope="col">{{ words.paid_by }}</th><th scope="col">{{ words.attempt }}</th></tr></thead>
        <tbody>
          <tr v-for="row in scene.rows" :key="row.number">
            <td>{{ row.claim }}</td><td>{{ euros(row.cents) }}</td><td>{{ /^\\d+$/.test(row.by) ? words.worker + ' ' + row.by : words.guest }}</td><td>{{ row.attempt }}</td>
          </tr>
        </tbody>
      </table>
    </div>`,
  computed: {
    lastOfEach() {
      const last = new Map(this.scene.wrongs.map((wrong) => [wrong.kind, wrong]));
      return [...last.values()];
    },
  },
  methods: {
    show(scene) {
      this.scene = scene;
    },
    euros(cents) {
      return new Intl.NumberFormat(this.words.locale, { style: "currency", currency: "EUR" }).format(cents / 100);
    },
    cause(wrong) {
      const why = this.words[`why_${wrong.kind}_${wrong.cause || "nothing"}`] || this.words.why_nothing;
      return `${this.words.claim} ${wrong.claim}${this.words.colon}${this.words["was_" + wrong.kind]}. ${why.replace("{worker}", wrong.worker)}`;
    },
  },
};
